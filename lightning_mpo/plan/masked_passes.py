"""Peak memory of the passes of a masked policy over whole canvases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mpo.objective.likelihoods import Denoising
from lightning_mpo.plan.passes import Passes
from lightning_mpo.policies.masked_checks import mask_forms
from lightning_mpo.policies.masked_inputs import RowInputs
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.diffusion import DiffusionSampler


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
