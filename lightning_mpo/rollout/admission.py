"""Checks of a rollout from any sampler, before it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import supports as F
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.types import NEVER, Rollout

MAX_LOGPROB = 1e-4
"""A recorded log-prob may be this far above 0, by rounding."""
MAX_GAP = 1e-3
"""Nats between the two records of a sampled token's log-prob, by rounding."""


def check_rollout(
    rollout: Rollout,
    support: Support,
    vocabulary: int,
    behaviour: bool = False,
    candidates: int = 0,
    completions: int | None = None,
    barred: Sequence[int] = (),
) -> Rollout:
    """Check groups, ids, supports and log-probs of a rollout.

    Supports are united with sampled tokens if the objective allows it.

    Args:
        rollout: a rollout from a sampler or a file.
        support: the support of the objective.
        vocabulary: V, the size of the policy's vocabulary.
        behaviour: whether the objective uses the sampler's log-probs.
        candidates: K, the number of ids that the surrogate compares at each token.
        completions: G, the adjacent rows of each prompt; None: groups are not checked.
        barred: ids to which the policy gives probability 0.

    Returns:
        The rollout; its supports also hold the sampled tokens that they lacked.

    Raises:
        UserError: a group is split or has another size than G; an id is not in the policy's
            vocabulary, or has probability 0; a support is stored and the objective has none, or
            the reverse; a sampled token is outside its support; needed log-probs or candidates are
            missing or invalid.
    """
    if completions is not None:
        _check_groups(rollout.group_B, completions)
    if behaviour or candidates:
        _check_behaviour(rollout)
    if barred:
        _check_barred(rollout, barred)
    admitted = _admit_support(rollout, support, vocabulary)
    if candidates:
        _check_candidates(admitted, candidates, vocabulary)
    return admitted


def _admit_support(rollout: Rollout, support: Support, vocabulary: int) -> Rollout:
    _check_ids("tokens", rollout.tokens_BL[rollout.attention_mask_BL], vocabulary)
    # supports are there if and only if the objective has one
    truncated = not isinstance(support, FullVocabulary)
    if rollout.support_BTK is None and truncated:
        raise UserError(
            "the rollout stores no supports, but `objective.support` is "
            f"{type(support).__name__}: sample with that support, or set `objective.support: "
            "FullVocabulary`"
        )
    if rollout.support_BTK is None:
        return rollout
    if not truncated:
        raise UserError(
            "the rollout was drawn from supports, but `objective.support` is FullVocabulary, so "
            "that every ratio would carry the mass of the support as a factor: give the support "
            "it was drawn from"
        )
    # ids, and sampled tokens outside their support
    used_BTK = _drawn(rollout)[..., None].expand_as(rollout.support_BTK)
    if rollout.support_mask_BTK is not None:
        used_BTK = used_BTK & rollout.support_mask_BTK
    _check_ids("supports", rollout.support_BTK[used_BTK], vocabulary)
    return _unite(rollout, support)


def _check_groups(group_B: Tensor, completions: int) -> None:
    """Refuse groups that are not G adjacent rows, which advantages take as one group."""
    ids, sizes = group_B.unique_consecutive(return_counts=True)
    split_groups = len(ids) - len(ids.unique())
    if split_groups or bool((sizes != completions).any()):
        fault = (
            "rows of one prompt apart from each other"
            if split_groups
            else f"groups of {sorted(set(sizes.tolist()))} rows"
        )
        raise UserError(
            f"the rollout has {fault}; let the sampler return the {completions} completions "
            "(`rollout.completions`) of a prompt below each other, with one `group_B`"
        )


def _check_behaviour(rollout: Rollout) -> None:
    logprobs_BT: Tensor | None = rollout.behaviour_logprobs_BT
    if logprobs_BT is None:
        raise UserError(
            "the rollout has no `behaviour_logprobs_BT`, against which the objective takes "
            "ratios: let the sampler record the log-probs of what it drew"
        )
    logprobs = logprobs_BT[_drawn(rollout)]
    invalid = int((~logprobs.isfinite() | (logprobs > MAX_LOGPROB)).sum())
    if invalid:
        raise UserError(
            f"`behaviour_logprobs_BT` must hold log-probs, finite and at most 0, got {invalid} of "
            f"{len(logprobs)} sampled tokens with others: were logits or probabilities recorded?"
        )


def _check_candidates(rollout: Rollout, k: int, vocabulary: int) -> None:
    """Refuse candidates from which no divergence can be computed."""
    mask_BT, ids_BTK, logprobs_BTK = (
        rollout.response_mask_BT,
        rollout.candidates_BTK,
        rollout.candidate_logprobs_BTK,
    )
    if ids_BTK is None or logprobs_BTK is None:
        raise UserError(
            "the rollout has no `candidates_BTK` with log-probs, of which `objective.surrogate` "
            f"compares {k}: let the sampler record them (`candidates`), or set `top_k: null`"
        )
    # log-probs and ids of the used slots
    ids, logprobs = ids_BTK[mask_BT].long(), logprobs_BTK[mask_BT]
    if logprobs.isnan().any() or (logprobs > MAX_LOGPROB).any():
        raise UserError(
            "`candidate_logprobs_BTK` must hold log-probs, at most 0, or -inf in slots without "
            "an id"
        )
    used = logprobs > -torch.inf
    _check_ids("candidates", ids[used], vocabulary)
    # ids are distinct; empty slots get distinct ids above the vocabulary for the comparison
    fillers = torch.arange(ids.shape[-1], device=ids.device) + vocabulary
    if (torch.where(used, ids, fillers).sort(-1).values.diff(dim=-1) == 0).any():
        raise UserError(
            "`candidates_BTK` must hold distinct ids: the mass of one that comes twice would "
            "count twice"
        )
    # the sampled token is among them, with the same log-prob
    sampled = used & (ids == rollout.responses_BT[mask_BT].unsqueeze(-1))
    missing = int((~sampled.any(-1)).sum())
    if missing:
        raise UserError(
            f"{missing} of {len(ids)} sampled tokens are not among their `candidates_BTK`: record "
            "the sampled token besides the most probable ones"
        )
    gap = logprobs.masked_fill(~sampled, 0).sum(-1) - rollout.behaviour_logprobs_BT[mask_BT]
    if (gap.abs() > MAX_GAP).any():
        raise UserError(
            "`candidate_logprobs_BTK` and `behaviour_logprobs_BT` differ by up to "
            f"{gap.abs().max().item():.3g} nats for the same token: record both after temperature "
            "and support"
        )
    # candidates are part of the stored support
    if rollout.support_BTK is not None:
        slots = None if rollout.support_mask_BTK is None else rollout.support_mask_BTK[mask_BT]
        zeros = torch.zeros_like(rollout.support_BTK[mask_BT], dtype=logprobs.dtype)
        inside = F.logprobs_at(ids, rollout.support_BTK[mask_BT], zeros, slots) > -torch.inf
        if (used & ~inside).any():
            raise UserError(
                "`candidates_BTK` must be ids of the stored support: what is outside was never "
                "drawn from"
            )


def _drawn(rollout: Rollout) -> Tensor:
    """Return the tokens that a sampler drew: those of responses, and on a canvas also others."""
    if rollout.reveal_BT is None:
        return rollout.response_mask_BT
    return rollout.response_mask_BT | (rollout.reveal_BT != NEVER)


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise UserError(
            f"the {name} of the rollout hold ids from {int(ids.min())} to {int(ids.max())}, the "
            f"policy has 0 to {vocabulary - 1}: was it sampled with another tokenizer?"
        )


def _check_barred(rollout: Rollout, barred: Sequence[int]) -> None:
    """Refuse drawn tokens and supports with ids of probability 0."""
    ids = torch.tensor(barred, device=rollout.tokens_BL.device)
    drawn_BT = _drawn(rollout)
    barred_tokens = rollout.responses_BT[drawn_BT & torch.isin(rollout.responses_BT, ids)]
    if len(barred_tokens):
        raise UserError(
            f"{len(barred_tokens)} response tokens of the rollout have probability 0 under the "
            f"policy, such as id {int(barred_tokens[0])}: MASK and PAD are never drawn; sample "
            "with `DiffusionSampler`"
        )
    if rollout.support_BTK is None:
        return
    used_BTK = drawn_BT[..., None] & torch.isin(rollout.support_BTK, ids)
    if rollout.support_mask_BTK is not None:
        used_BTK = used_BTK & rollout.support_mask_BTK
    barred_slots = rollout.support_BTK[used_BTK]
    if len(barred_slots):
        raise UserError(
            f"supports of the rollout hold ids of probability 0 under the policy, such as "
            f"{int(barred_slots[0])}: let the support leave MASK and PAD out"
        )


def _unite(rollout: Rollout, support: Support) -> Rollout:
    assert rollout.support_BTK is not None
    # sampled tokens outside their support
    drawn_BT = _drawn(rollout)
    outside_BT = F.outside(
        rollout.responses_BT,
        rollout.support_BTK,
        rollout.support_mask_BTK,
        drawn_BT,
    )
    if rollout.support_mask_BTK is not None and support.by_step:
        outside_BT = outside_BT & rollout.support_mask_BTK.any(-1)  # empty: the whole vocabulary
    missing, name = int(outside_BT.sum()), type(support).__name__
    if not missing:
        return rollout
    if support.outside == "refuse":
        raise UserError(
            f"{missing} of {int(drawn_BT.sum())} sampled tokens are not in the "
            f"support stored with them; `{name}.outside: unite` (or `drop`, without loss on them) "
            "lets such tokens pass and counts them"
        )
    # add them
    support_BTK, support_mask_BTK = F.unite(
        rollout.responses_BT, rollout.support_BTK, rollout.support_mask_BTK, outside_BT
    )
    return replace(
        rollout, support_BTK=support_BTK, support_mask_BTK=support_mask_BTK, outside_BT=outside_BT
    )
