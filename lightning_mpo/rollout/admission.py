"""What a rollout must fulfil before it is trained on, whoever sampled it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import supports as F
from lightning_mpo.supports import FullVocabulary, Support
from lightning_mpo.types import Rollout


def admit(rollout: Rollout, support: Support, vocabulary: int) -> Rollout:
    """Check ids and supports of a rollout, and unite supports with sampled tokens where `support.outside` allows it.

    Args:
        rollout: what a sampler returned, or a file held.
        support: of the objective.
        vocabulary: V of the policy.

    Raises:
        UserError: ids that the policy does not know; a support where the objective has none, or none where it has one;
            a sampled token outside its support.
    """
    _check_ids("tokens", rollout.tokens_BL[rollout.attention_mask_BL], vocabulary)
    truncated = not isinstance(support, FullVocabulary)
    if rollout.support_BTK is None and truncated:
        raise UserError(
            f"the rollout stores no supports, but `objective.support` is {type(support).__name__}: sample with that "
            "support, or set `objective.support: FullVocabulary`"
        )
    if rollout.support_BTK is None:
        return rollout
    if not truncated:
        raise UserError(
            "the rollout was drawn from supports, but `objective.support` is FullVocabulary, so that every ratio would "
            "carry the mass of the support as a factor: give the support it was drawn from"
        )
    used_BTK = rollout.response_mask_BT[..., None].expand_as(rollout.support_BTK)
    if rollout.support_mask_BTK is not None:
        used_BTK = used_BTK & rollout.support_mask_BTK
    _check_ids("supports", rollout.support_BTK[used_BTK], vocabulary)
    return _unite(rollout, support)


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise UserError(
            f"the {name} of the rollout hold ids from {int(ids.min())} to {int(ids.max())}, the policy has 0 to "
            f"{vocabulary - 1}: was it sampled with another tokenizer?"
        )


def _unite(rollout: Rollout, support: Support) -> Rollout:
    assert rollout.support_BTK is not None
    outside_BT = F.outside(
        rollout.responses_BT, rollout.support_BTK, rollout.support_mask_BTK, rollout.response_mask_BT
    )
    missing, name = int(outside_BT.sum()), type(support).__name__
    if not missing:
        return rollout
    if support.outside == "refuse":
        raise UserError(
            f"{missing} of {int(rollout.response_mask_BT.sum())} sampled tokens are not in the support stored with them; "
            f"`{name}.outside: unite` (or `drop`, without loss on them) lets such tokens pass and counts them"
        )
    support_BTK, slots_BTK = F.unite(rollout.responses_BT, rollout.support_BTK, rollout.support_mask_BTK, outside_BT)
    return replace(rollout, support_BTK=support_BTK, support_mask_BTK=slots_BTK, outside_BT=outside_BT)
