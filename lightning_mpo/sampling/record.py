"""The record of a sampling loop, step by step, and the rollout that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.policies.base import Policy
from lightning_mpo.sampling.base import decode
from lightning_mpo.types import Finish, PromptBatch, Rollout


@dataclass(frozen=True)
class Drawn:
    """Tokens of one step by row, and the distributions that they were drawn from."""

    tokens_B: Tensor
    logprobs_B: Tensor
    kept_mass_B: Tensor
    support_BK: Tensor | None = None
    support_mask_BK: Tensor | None = None
    candidates_BK: Tensor | None = None
    candidate_logprobs_BK: Tensor | None = None


@dataclass
class Record:
    """Results of all steps, by row and position."""

    tokens_BT: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    kept_mass_BT: Tensor
    finish_B: Tensor
    support_BTK: Tensor | None = None
    support_mask_BTK: Tensor | None = None
    candidates_BTK: Tensor | None = None
    candidate_logprobs_BTK: Tensor | None = None

    @classmethod
    def empty(cls, B: int, T: int, device: torch.device) -> Record:
        """Return a record of B rows without tokens, each cut off at its longest length T."""
        return cls(
            tokens_BT=torch.zeros(B, T, dtype=torch.long, device=device),
            mask_BT=torch.zeros(B, T, dtype=torch.bool, device=device),
            logprobs_BT=torch.zeros(B, T, device=device),
            kept_mass_BT=torch.ones(B, T, device=device),
            finish_B=torch.full((B,), int(Finish.LENGTH), device=device),
        )

    def write(self, t: int, rows: Tensor, running: Tensor, drawn: Drawn) -> None:
        """Record one step of the running rows."""
        self.tokens_BT[rows, t] = drawn.tokens_B[running]
        self.mask_BT[rows, t] = True
        self.logprobs_BT[rows, t] = drawn.logprobs_B[running]
        self.kept_mass_BT[rows, t] = drawn.kept_mass_B[running]
        for name in ("support", "support_mask", "candidates", "candidate_logprobs"):
            values_BK, place = getattr(drawn, f"{name}_BK"), f"{name}_BTK"
            if values_BK is None:
                continue
            if getattr(self, place) is None:
                empty = -torch.inf if values_BK.is_floating_point() else 0
                shape = (*self.tokens_BT.shape, values_BK.shape[1])
                setattr(self, place, values_BK.new_full(shape, empty))
            getattr(self, place)[rows, t] = values_BK[running]


def assemble(policy: Policy, prompts: PromptBatch, G: int, records: list[Record]) -> Rollout:
    """Join batches and cut columns that no response reached."""
    mask_BT = torch.cat([record.mask_BT for record in records])
    T = max(1, int(mask_BT.sum(1).max()))

    def join(name: str) -> Any:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else torch.cat(parts)[:, :T]

    # responses, and the prompt of each
    tokens_BT, mask_BT, device = join("tokens_BT"), mask_BT[:, :T], mask_BT.device
    ids_BS = prompts.input_ids_PS.to(device).repeat_interleave(G, 0)
    prompt_mask_BS = prompts.attention_mask_PS.to(device).repeat_interleave(G, 0)
    # without a support all mass is kept
    kept_mass_BT, support_BTK = join("kept_mass_BT"), join("support_BTK")
    return Rollout(
        tokens_BL=torch.cat([ids_BS, tokens_BT], 1),
        attention_mask_BL=torch.cat([prompt_mask_BS, mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=torch.arange(len(prompts), device=device).repeat_interleave(G),
        behaviour_logprobs_BT=join("logprobs_BT"),
        finish_B=torch.cat([record.finish_B for record in records]),
        support_BTK=support_BTK,
        support_mask_BTK=join("support_mask_BTK"),
        kept_mass_BT=None if support_BTK is None else kept_mass_BT,
        candidates_BTK=join("candidates_BTK"),
        candidate_logprobs_BTK=join("candidate_logprobs_BTK"),
        texts=decode(policy, tokens_BT, mask_BT),
        rows=tuple(row for row in prompts.rows for _ in range(G)),
    )
