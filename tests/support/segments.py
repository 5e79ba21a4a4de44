"""Rollouts of text, and their blocks as segmenters cut them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SegmentActions
from lightning_mpo.objective.segmenters import Segmenter
from lightning_mpo.types import Rollout
from tests.support.builders import seeded

LINES = ["a", "b", "\n", ".\n", "x=", ". The", " +"]
GAPS = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1], [0] * 8, [0, 1, 1, 0, 1, 0, 0, 1]]
).bool()


class Thirds(Segmenter):
    """What a user might write: blocks of three columns."""

    def segment(self, rollout, entropy_BT, texts):
        return (torch.arange(rollout.response_mask_BT.shape[1]) // 3).expand(
            rollout.response_mask_BT.shape
        )


def rollout_of(ids_BT: Tensor, mask_BT: Tensor | None = None, prompt: int = 2) -> Rollout:
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    B, T = ids_BT.shape
    tokens = torch.cat([torch.full((B, prompt), 2), ids_BT], 1)  # prompts hold delimiters, too
    attention = torch.cat([torch.ones(B, prompt, dtype=torch.bool), mask_BT], 1)
    return Rollout(tokens, attention, mask_BT, torch.arange(B), torch.zeros(B, T), torch.zeros(B))


def blocks(numbers: Tensor, mask_BT: Tensor) -> list[list[list[int]]]:
    """Return the positions of each block, row by row."""
    rows: list[list[list[int]]] = []
    for b in range(len(numbers)):
        found: dict[int, list[int]] = {}
        for t in mask_BT[b].nonzero()[:, 0].tolist():
            found.setdefault(int(numbers[b, t]), []).append(t)
        rows.append(list(found.values()))
    return rows


def cut(
    segmenter: Segmenter, rollout: Rollout, entropy=None, texts=(), **options
) -> list[list[list[int]]]:
    numbers = SegmentActions(segmenter, **options).segment(rollout, entropy, texts)
    return blocks(numbers, rollout.response_mask_BT)


def random_rollout(seed: int = 0, vocabulary: int = len(LINES)) -> Rollout:
    ids = torch.randint(0, vocabulary, GAPS.shape, generator=seeded(seed))
    return rollout_of(ids, GAPS)


def naive_delimiters(
    rollout: Rollout, delimiters: list[str], max_length: int | None
) -> list[list[list[int]]]:
    rows = []
    for b in range(len(rollout.group_B)):
        found, ended = [], True
        for t in range(rollout.response_mask_BT.shape[1]):
            if not rollout.response_mask_BT[b, t]:
                ended = True
                continue
            if ended or len(found[-1]) == max_length:
                found.append([])
            found[-1].append(t)
            ended = any(d in LINES[rollout.responses_BT[b, t]] for d in delimiters)
        rows.append(found)
    return rows
