"""Peak memory of the passes of a masked policy over whole canvases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mpo.objective.likelihoods import Denoising, Likelihood
from lightning_mpo.plan.passes import Passes
from lightning_mpo.policies.masked_checks import mask_forms
from lightning_mpo.policies.masked_inputs import RowInputs
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Rollout

CANVAS = 4
"""Tokens of the canvas on which a likelihood shows how many copies a row has."""


class MaskedPasses(Passes):
    """Passes over rows with MASK; each attends to the whole row."""

    def tokens(self, rows: int, response: int) -> int:
        if isinstance(self.likelihood, Denoising):  # the tokens of one step
            return rows * tokens_of_step(self.sampler, response)
        return rows * response

    def rows_of(self, rows: int, response: int) -> tuple[int, int]:
        """Return the number of rows and their length."""
        return rows, self.prompt + response

    def states(self, network: Any, rows: Any) -> Tensor:
        form = mask_forms(self.policy.kind, self.policy.config)[0]
        ids_BL = torch.zeros(rows, dtype=torch.long)
        return RowInputs.of(network, form).states(
            network, ids_BL, torch.ones(rows, dtype=torch.bool)
        )


def tokens_of_step(sampler: Sampler, response: int) -> int:
    """Return the tokens that a step of a sampler reveals in each row."""
    return min(getattr(sampler, "tokens_per_step", 1), response)


def tokens_of_block(sampler: Sampler, response: int) -> int:
    """Return the tokens of a block, for which a step of a sampler computes logits."""
    return sampler.block if isinstance(sampler, DiffusionSampler) else response


def copies_in_row(likelihood: Likelihood) -> int:
    """Return C, the number of noised copies that one row holds."""
    column_T = torch.arange(CANVAS)[None]
    rollout = Rollout(
        tokens_BL=column_T,
        attention_mask_BL=torch.ones_like(column_T, dtype=torch.bool),
        response_mask_BT=torch.ones_like(column_T, dtype=torch.bool),
        group_B=torch.zeros(1, dtype=torch.long),
        behaviour_logprobs_BT=torch.zeros(1, CANVAS),
        finish_B=torch.zeros(1, dtype=torch.long),
        reveal_BT=column_T.int(),
        reveal_entropy_BT=torch.ones(1, CANVAS),
    )
    return likelihood.draw(rollout, generator_of(0, Stream.CHECK)).hidden_BCL.shape[1]
