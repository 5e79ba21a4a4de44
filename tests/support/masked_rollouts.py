"""Rollouts as a sampler of a masked model would make them: a canvas of blocks, revealed step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo, Likelihood
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from lightning_mpo.objective.reductions import ConstantLength
from lightning_mpo.rollout.noised import with_noise
from lightning_mpo.types import NEVER, Experience, Finish, Rollout
from tests.support.builders import END, PAD, VOCABULARY, right_padded, seeded

ENDS = [3, 0, 7, None, 1, 5]
"""Place of the first end token in the six rows of `masked_rollout`; None: the canvas has none."""
LIKELIHOODS: list[Likelihood] = [
    CoupledElbo(pairs=2),
    CoupledElbo(padding=False),
    Elbo(samples=3),
    Elbo(samples=2, padding=False),
    Denoising(steps=3),
    Denoising(steps=3, importance="entropy"),
    MeanField(),
    CoupledTokens(),
]


def masked_rollout(
    ends: Sequence[int | None] = ENDS,
    *,
    canvas: int = 8,
    block: int = 4,
    per_step: int = 2,
    prompts: Sequence[int] = (3, 5),
    seed: int = 0,
) -> Rollout:
    """Return rows in groups of equal size, one group for each prompt length.

    Behind its first end token a row holds other tokens up to the end of the block, and then end
    tokens that no step drew. The steps of a block reveal `per_step` of its tokens each, in a random
    order.

    Args:
        ends: place of the first end token of each row, or None.
        canvas: tokens of a response.
        block: tokens of a block.
        per_step: tokens that a step reveals.
        prompts: tokens of each prompt; the others are padding on the left.
        seed: of all random numbers.
    """
    g, B, S = seeded(seed), len(ends), max(prompts)
    group_B = torch.arange(len(prompts)).repeat_interleave(B // len(prompts))
    prompt_mask_BS = right_padded(prompts).flip(1)[group_B]
    prompt_BS = torch.randint(2, VOCABULARY, (len(prompts), S), generator=g)[group_B]
    tokens_BT = torch.randint(2, VOCABULARY, (B, canvas), generator=g)
    reveal_BT = torch.zeros(B, canvas, dtype=torch.int32)
    mask_BT = torch.ones(B, canvas, dtype=torch.bool)
    steps = block // per_step
    for b, end in enumerate(ends):
        for first in range(0, canvas, block):
            order = torch.randperm(block, generator=g) // per_step
            reveal_BT[b, first : first + block] = order + first // block * steps
        if end is not None:
            tokens_BT[b, end] = END
            mask_BT[b, end + 1 :] = False
            behind = (end // block + 1) * block
            tokens_BT[b, behind:], reveal_BT[b, behind:] = END, NEVER
    drawn_BT = reveal_BT != NEVER
    logprobs_BT = -3 * torch.rand(B, canvas, generator=g) * drawn_BT
    canvas_mask_BT = torch.ones(B, canvas, dtype=torch.bool)
    return Rollout(
        tokens_BL=torch.cat([prompt_BS.masked_fill(~prompt_mask_BS, PAD), tokens_BT], 1),
        attention_mask_BL=torch.cat([prompt_mask_BS, canvas_mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=group_B,
        behaviour_logprobs_BT=logprobs_BT,
        finish_B=torch.tensor([int(Finish.LENGTH if end is None else Finish.STOP) for end in ends]),
        reveal_BT=reveal_BT,
        reveal_entropy_BT=2 * torch.rand(B, canvas, generator=g) * drawn_BT,
    )


def judged(rollout: Rollout, advantages_B: Tensor | None = None) -> Experience:
    """Return the experience of a rollout before it has noise: advantages on its response tokens."""
    B = len(rollout.group_B)
    if advantages_B is None:
        advantages_B = torch.randn(B, generator=seeded(7))
    return Experience(
        rollout=rollout,
        rewards_B=torch.arange(B).float(),
        valid_B=torch.ones(B, dtype=torch.bool),
        advantages_BT=advantages_B[:, None] * rollout.response_mask_BT,
        token_weights_BT=rollout.response_mask_BT.float(),
    )


def noised(likelihood: Likelihood, *, passes: int, **changes: Tensor) -> Experience:
    """Return the rows of `masked_rollout` with noise.

    Args:
        likelihood: draws it.
        passes: over the rollout.
        changes: fields of the experience to replace before.
    """
    return with_noise(
        replace(judged(masked_rollout()), **changes), likelihood, seeded(0), passes=passes
    )


def masked_objective(likelihood: Likelihood, **axes: Any) -> Objective:
    """Return an objective whose actions fit a likelihood; its mean is over rows."""
    actions = {} if likelihood.token_level else {"actions": SequenceActions(mean=False)}
    return Objective(likelihood=likelihood, **{"reduction": ConstantLength(1)} | actions | axes)
