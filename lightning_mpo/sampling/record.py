"""The record of a sampling loop, step by step, and the rollout that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.policies.base import Policy
from lightning_mpo.sampling.base import decode
from lightning_mpo.sampling.drawing import Drawn
from lightning_mpo.types import NEVER, Finish, PromptBatch, Rollout


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
    # of a sampler that reveals a canvas in steps
    reveal_BT: Tensor | None = None
    entropy_BT: Tensor | None = None

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

    @classmethod
    def canvas(cls, B: int, T: int, end: int, device: torch.device) -> Record:
        """Return a record of B canvases of T tokens, each `end` until a step reveals another."""
        record = cls.empty(B, T, device)
        record.tokens_BT.fill_(end)
        record.reveal_BT = torch.full((B, T), NEVER, dtype=torch.int32, device=device)
        record.entropy_BT = torch.zeros(B, T, device=device)
        return record

    def write(self, t: int | Tensor, rows: Tensor, chosen: Tensor, drawn: Drawn) -> None:
        """Record tokens of one step.

        Args:
            t: one column for all tokens, or one for each.
            rows: one row for each.
            chosen: the tokens to record among those drawn, as bool or by number.
            drawn: all tokens that the step drew.
        """
        self.tokens_BT[rows, t] = drawn.tokens_B[chosen]
        self.mask_BT[rows, t] = True
        self.logprobs_BT[rows, t] = drawn.logprobs_B[chosen]
        self.kept_mass_BT[rows, t] = drawn.kept_mass_B[chosen]
        if self.entropy_BT is not None and drawn.entropy_B is not None:
            self.entropy_BT[rows, t] = drawn.entropy_B[chosen]
        for name in ("support", "support_mask", "candidates", "candidate_logprobs"):
            values_BK, place = getattr(drawn, f"{name}_BK"), f"{name}_BTK"
            if values_BK is None:
                continue
            if getattr(self, place) is None:
                empty = -torch.inf if values_BK.is_floating_point() else 0
                shape = (*self.tokens_BT.shape, values_BK.shape[1])
                setattr(self, place, values_BK.new_full(shape, empty))
            getattr(self, place)[rows, t] = values_BK[chosen]

    def end(self, end_tokens: list[int]) -> None:
        """Let the response of each canvas end with the first end token."""
        ends = torch.tensor(end_tokens, dtype=torch.long, device=self.tokens_BT.device)
        is_end_BT = torch.isin(self.tokens_BT, ends)
        self.mask_BT = is_end_BT.cumsum(1) - is_end_BT.long() == 0
        self.finish_B[is_end_BT.any(1)] = int(Finish.STOP)


def assemble(policy: Policy, prompts: PromptBatch, G: int, records: list[Record]) -> Rollout:
    """Join batches and cut columns that no response reached; a canvas stays whole."""
    mask_BT = torch.cat([record.mask_BT for record in records])
    has_canvas = records[0].reveal_BT is not None
    T = mask_BT.shape[1] if has_canvas else max(1, int(mask_BT.sum(1).max()))

    def join(name: str) -> Any:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else torch.cat(parts)[:, :T]

    # responses, and the prompt of each
    tokens_BT, mask_BT, device = join("tokens_BT"), mask_BT[:, :T], mask_BT.device
    ids_BS = prompts.input_ids_PS.to(device).repeat_interleave(G, 0)
    seen_BT = torch.ones_like(mask_BT) if has_canvas else mask_BT
    prompt_mask_BS = prompts.attention_mask_PS.to(device).repeat_interleave(G, 0)
    # without a support all mass is kept
    kept_mass_BT, support_BTK = join("kept_mass_BT"), join("support_BTK")
    return Rollout(
        tokens_BL=torch.cat([ids_BS, tokens_BT], 1),
        attention_mask_BL=torch.cat([prompt_mask_BS, seen_BT], 1),
        response_mask_BT=mask_BT,
        group_B=torch.arange(len(prompts), device=device).repeat_interleave(G),
        behaviour_logprobs_BT=join("logprobs_BT"),
        finish_B=torch.cat([record.finish_B for record in records]),
        support_BTK=support_BTK,
        support_mask_BTK=join("support_mask_BTK"),
        kept_mass_BT=None if support_BTK is None else kept_mass_BT,
        candidates_BTK=join("candidates_BTK"),
        candidate_logprobs_BTK=join("candidate_logprobs_BTK"),
        reveal_BT=join("reveal_BT"),
        reveal_entropy_BT=join("entropy_BT"),
        texts=decode(policy, tokens_BT, mask_BT),
        rows=tuple(row for row in prompts.rows for _ in range(G)),
    )
