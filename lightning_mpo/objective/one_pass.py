"""Likelihoods of masked language models from one pass, or from three (docs/algorithms.md 17.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.checks import within
from lightning_mpo.errors import UserError
from lightning_mpo.objective.likelihoods import Likelihood, Noise, behind_prompt
from lightning_mpo.types import Rollout


@dataclass(frozen=True)
class MeanField(Likelihood):
    """One copy, which hides the whole canvas and a part of the prompt (diffu-GRPO).

        log-prob of t = log p(y_t | the canvas and a part of the prompt hidden)

    The sum over a response can lie on either side of the ELBO [V]. docs/algorithms.md 17.5; the
    repository of d1 [C].

    Args:
        prompt_share: probability of hiding a token of the prompt.
    """

    token_level = True

    prompt_share: float = 0.15

    def __post_init__(self) -> None:
        within("MeanField", "[0, 1)", prompt_share=self.prompt_share)

    def scored(self, rollout: Rollout) -> Tensor:
        return rollout.response_mask_BT

    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        canvas_BT = super().scored(rollout).cpu()
        hidden_BCL = behind_prompt(rollout, canvas_BT[:, None])
        S = rollout.prompt_length
        uniform_BS = torch.rand(len(canvas_BT), S, generator=generator)
        seen_BS = rollout.attention_mask_BL[:, :S].cpu()
        hidden_BCL[:, 0, :S] = (uniform_BS < self.prompt_share) & seen_BS
        return Noise(hidden_BCL, self.scored(rollout).cpu().float()[:, None])


@dataclass(frozen=True)
class CoupledTokens(Likelihood):
    """Three copies: one hides the whole canvas, one a random share, one the rest (coupled-GRPO).

        log-prob of t = ½ [log p(y_t | all hidden) + log p(y_t | the copy that hides t) / share]

    The share is ρ of the second copy and 1 - ρ of the third; each row draws its own ρ.
    docs/algorithms.md 17.5; the repository of DiffuCoder [C].

    Args:
        least: smallest ρ.
        most: largest ρ.
    """

    token_level = True

    least: float = 0.2
    most: float = 0.8

    def __post_init__(self) -> None:
        within("CoupledTokens", "(0, 1)", least=self.least, most=self.most)
        if self.least > self.most:
            raise UserError(
                f"`CoupledTokens.least` ({self.least}) must be at most `most` ({self.most})"
            )

    @property
    def copies(self) -> int:
        return 3

    def scored(self, rollout: Rollout) -> Tensor:
        return rollout.response_mask_BT

    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        canvas_BT, scored_BT = super().scored(rollout).cpu(), self.scored(rollout).cpu()
        B, T = canvas_BT.shape
        share_B1 = self.least + (self.most - self.least) * torch.rand(B, 1, generator=generator)
        chosen_BT = (torch.rand(B, T, generator=generator) < share_B1) & canvas_BT
        hidden_BCT = torch.stack([canvas_BT, chosen_BT, canvas_BT & ~chosen_BT], 1)
        factor_BC = torch.cat([torch.full((B, 1), 0.5), 0.5 / share_B1, 0.5 / (1 - share_B1)], 1)
        weights_BCT = factor_BC[..., None] * (hidden_BCT & scored_BT[:, None])
        return Noise(behind_prompt(rollout, hidden_BCT), weights_BCT.float())
