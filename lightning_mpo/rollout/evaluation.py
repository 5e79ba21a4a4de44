"""Decoding settings and the running totals of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_mpo.metrics import PassAtK
from lightning_mpo.rewards.base import Scores
from lightning_mpo.supports import FullVocabulary, Support
from lightning_mpo.types import Rollout


@dataclass(frozen=True)
class Decoding:
    """How an evaluation samples.

    Args:
        support: restricts every step.
        completions: per prompt.
        greedy: take the most probable token.
    """

    support: Support
    completions: int
    greedy: bool = False


def decodings(support: Support, completions: int) -> dict[str, Decoding]:
    """Return how an evaluation samples, by the prefix of its metrics: untruncated, and with a truncated training support.

    Training over a support never touches the tail of the distribution, so that both must be watched (core spec 2.4).
    """
    found = {"": Decoding(FullVocabulary(), completions)}
    if not isinstance(support, FullVocabulary):
        found["support "] = Decoding(support, completions)
    return found


class Tally:
    """Adds up accuracy, reward and length over batches.

    Args:
        ks: the k of each pass@k.
    """

    def __init__(self, ks: Sequence[int]) -> None:
        self.passes = {k: PassAtK(k) for k in ks}
        self._reward = self._length = self._truncated = 0.0
        self._rows = 0

    def add(self, rollout: Rollout, scores: Scores, completions: int) -> None:
        """Take one batch of whole groups."""
        correct_PG = scores.correct_B.view(-1, completions).cpu()
        for metric in self.passes.values():
            metric.update(correct_PG)
        self._reward += scores.rewards_B.sum().item()
        self._length += rollout.response_mask_BT.sum().item()
        self._truncated += rollout.finish_B.sum().item()
        self._rows += len(scores.rewards_B)

    def compute(self) -> dict[str, float]:
        """Return means by name."""
        if not self._rows:
            return {}
        values = {f"pass@{k}": torch.as_tensor(metric.compute()).item() for k, metric in self.passes.items()}
        return values | {
            "reward": self._reward / self._rows,
            "length": self._length / self._rows,
            "truncated": self._truncated / self._rows,
        }
