"""Data of two prompts, and a reward that a small policy learns in a few updates."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.types import PromptRow
from tests.support.builders import make_prompts


class TwoPrompts:
    """Serves the same two prompts for ever."""

    def training_rows(self, counter, count, round=0):
        return [PromptRow(prompt=str(i % 2), target="") for i in range(count)]

    def encode(self, rows):
        prompts = make_prompts([4, 3])
        index = torch.tensor([int(row.prompt) for row in rows])
        return replace(
            prompts,
            input_ids_PS=prompts.input_ids_PS[index],
            attention_mask_PS=prompts.attention_mask_PS[index],
            rows=tuple(rows),
        )


def places_with_token_5(rollout) -> Scores:
    """Reward the share of the six places of a response that hold token 5."""
    share_B = ((rollout.responses_BT == 5) & rollout.response_mask_BT).sum(1) / 6
    judged_B = torch.ones(len(share_B), dtype=torch.bool)
    return Scores(
        share_B.double(), judged_B, share_B > 0.5, judged_B, {"share": share_B.double()}, judged_B
    )
