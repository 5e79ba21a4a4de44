"""Random batches and naive references that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Experience, PromptBatch, PromptRow, Rollout

CHARACTERS = "0123456789+-*=;, "
VOCABULARY = 19  # of `TinyPolicy(CHARACTERS)`
PAD, END = 0, 1


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator."""
    return torch.Generator().manual_seed(seed)


def subclasses(base: type) -> set[type]:
    """Return every concrete subclass that the package defines, so that a law suite can show it has them all."""
    found: set[type] = set()
    for child in base.__subclasses__():
        found |= subclasses(child)
        if not getattr(child, "__abstractmethods__", None) and child.__module__.startswith(
            "lightning_mpo"
        ):
            found.add(child)
    return found


def right_padded(lengths: Sequence[int], width: int | None = None) -> Tensor:
    """Return a mask `[B, T]` with `lengths[b]` leading True."""
    width = max(lengths) if width is None else width
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def make_prompts(lengths: Sequence[int], *, extra: int = 0, seed: int = 0) -> PromptBatch:
    """Return random prompts, padded on the left to the longest plus `extra`."""
    width = max(lengths) + extra
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=seeded(seed))
    mask = right_padded(lengths, width).flip(1)
    rows = tuple(PromptRow(prompt=str(p), target=str(-p)) for p in range(len(lengths)))
    return PromptBatch(ids.masked_fill(~mask, PAD), mask, rows)


def make_rollout(
    prompts: Sequence[int],
    responses: Sequence[int],
    *,
    support: int | None = None,
    slots: bool = False,
    left: int = 0,
    right: int = 0,
    order: Sequence[int] | None = None,
    seed: int = 0,
) -> Rollout:
    """Return random tokens: `prompts[p]` prompt tokens each, `responses[b]` response tokens, groups side by side.

    Args:
        prompts: prompt lengths; rows are shared out evenly among them.
        responses: response lengths.
        support: size of a random stored support that holds the sampled token in a random slot.
        slots: leave the last slots of some supports out through `support_mask_BTK`.
        left: extra columns of padding on the left.
        right: extra columns of padding on the right.
        order: permutation of the rows at the end.
        seed: of everything; padding does not change what is drawn.
    """
    g = seeded(seed)
    B, P, S, T = len(responses), len(prompts), max(prompts), max(responses)
    group = torch.arange(P).repeat_interleave(B // P)
    prompt_mask = right_padded(prompts).flip(1)[group]
    prompt_ids = torch.randint(2, VOCABULARY, (P, S), generator=g)[group]
    mask = right_padded(responses)
    tokens = torch.randint(1, VOCABULARY, (B, T), generator=g)
    ids = torch.cat([prompt_ids.masked_fill(~prompt_mask, PAD), tokens.masked_fill(~mask, PAD)], 1)
    fields: dict[str, Any] = {}
    if support is not None:
        order_V = (
            torch.rand(B, T, VOCABULARY, generator=g)
            .scatter(2, tokens[..., None], -1.0)
            .argsort(-1)
        )
        chosen = order_V[..., :support]  # the sampled token first …
        shuffle = torch.rand(B, T, support, generator=g)
        if slots:
            held = torch.rand(B, T, support, generator=g) < 0.6
            held[..., 0] = True
            fields["support_mask_BTK"] = held
        place = shuffle.argsort(-1)  # … and then anywhere
        chosen = chosen.gather(2, place)
        if slots:
            fields["support_mask_BTK"] = fields["support_mask_BTK"].gather(2, place)
        fields["support_BTK"] = chosen.int()
    pad = torch.nn.functional.pad
    for name, value in fields.items():
        fields[name] = pad(value, (0, 0, 0, right))
    rollout = Rollout(
        tokens_BL=pad(ids, (left, right), value=PAD),
        attention_mask_BL=pad(torch.cat([prompt_mask, mask], 1), (left, right), value=False),
        response_mask_BT=pad(mask, (0, right), value=False),
        group_B=group,
        behaviour_logprobs_BT=torch.zeros(B, T + right),
        finish_B=torch.zeros(B, dtype=torch.int64),
        **fields,
    )
    if order is None:
        return rollout
    from lightning_mpo.types import take_rows

    return take_rows(rollout, torch.tensor(order))


def make_experience(
    mask_BT: Tensor,
    advantages_BT: Tensor,
    *,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    **fields: Any,
) -> Experience:
    """Return an experience over a response mask; prompts are one token long. Tokens are random."""
    B, T = mask_BT.shape
    rollout = Rollout(
        tokens_BL=torch.randint(0, VOCABULARY, (B, T + 1), generator=seeded(99)),
        attention_mask_BL=torch.cat([torch.ones(B, 1, dtype=torch.bool), mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=torch.arange(B) // 2,
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.zeros(B, dtype=torch.int64),
    )
    return Experience(
        rollout=rollout,
        rewards_B=torch.zeros(B),
        valid_B=torch.ones(B, dtype=torch.bool) if valid is None else valid,
        advantages_BT=advantages_BT,
        token_weights_BT=mask_BT.float() if weights is None else weights,
        **fields,
    )


def scores_of(
    logits_BTV: Tensor, tokens_BT: Tensor, mask_BT: Tensor, rollout: Rollout | None = None
) -> TokenScores:
    """Score tokens under a table of logits, with gradient, as a policy would: 0 where masked.

    The candidates of a rollout are scored as well, if it records any.
    """
    logprobs = logits_BTV.log_softmax(-1)
    chosen = logprobs.gather(2, tokens_BT[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    candidates = None
    if rollout is not None and rollout.candidates_BTK is not None:
        named = (rollout.candidate_logprobs_BTK > -torch.inf) & mask_BT[..., None]
        candidates = torch.where(
            named, logprobs.detach().gather(2, rollout.candidates_BTK.long()), -torch.inf
        )
    return TokenScores(
        torch.where(mask_BT, chosen, 0.0),
        torch.where(mask_BT, entropy, 0.0),
        candidate_logprobs_BTK=candidates,
    )


def naive_logprobs(
    network: torch.nn.Module, rollout: Rollout, *, temperature: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Score one row at a time, without padding, packing or chunks. Returns log-probs and entropies per row."""
    S, logprobs, entropies = rollout.prompt_length, [], []
    for b in range(len(rollout.group_B)):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        mask = rollout.response_mask_BT[b]
        response = rollout.responses_BT[b][mask]
        logits = network(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(response)] / temperature
        if rollout.support_BTK is not None:
            inside = torch.zeros(logits.shape, dtype=torch.bool)
            for t in range(len(response)):
                ids = rollout.support_BTK[b, t].long()
                if rollout.support_mask_BTK is not None:
                    ids = ids[rollout.support_mask_BTK[b, t]]
                inside[t, ids] = True
            logits = logits.masked_fill(~inside, -torch.inf)
        table = logits.log_softmax(-1)
        logprobs.append(table.gather(1, response[:, None])[:, 0])
        entropies.append(-(table.exp() * table.masked_fill(table == -torch.inf, 0)).sum(-1))
    return logprobs, entropies


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()
