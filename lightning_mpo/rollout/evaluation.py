"""Decoding settings and running totals of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_mpo.functional.divergences import k3
from lightning_mpo.metrics import PassAtK
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.noised import replay_steps
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.types import Rollout


@dataclass(frozen=True)
class Decoding:
    """How an evaluation samples.

    Args:
        support: token ids that each step may sample.
        completions: number of completions per prompt.
        greedy: take the most probable token instead of a sample.
    """

    support: Support
    completions: int
    greedy: bool = False


def decodings(support: Support, completions: int) -> dict[str, Decoding]:
    """Return the decodings of an evaluation by the prefix of their metrics.

    One samples from the full vocabulary. If the training support is truncated, another samples
    from it: training over a support does not change the tail of the distribution
    (docs/algorithms.md 2.5).
    """
    by_prefix = {"": Decoding(FullVocabulary(), completions)}
    if not isinstance(support, FullVocabulary):
        by_prefix["support_"] = Decoding(support, completions)
    return by_prefix


def divergence_of(scorer: Scorer, rollout: Rollout) -> tuple[float, int]:
    """Return the k3 divergence from the reference, in nats, summed over tokens; and their number.

    A masked policy scores tokens in the states in which the sampler revealed them.

    Args:
        scorer: scores with policy and reference.
        rollout: sampled responses.
    """
    mask_BT = rollout.response_mask_BT
    if scorer.policy.masked:
        rollout = replay_steps(rollout)
        mask_BT = mask_BT & rollout.response_mask_BT
    reference_BT = scorer.score(rollout, reference=True).logprobs_BT
    divergence_BT = k3(scorer.score(rollout).logprobs_BT, reference_BT)
    return divergence_BT[mask_BT].sum().item(), int(mask_BT.sum())


def readable(name: str) -> str:
    """Return the name of a metric as tables print it.

    Example:
        >>> readable("support_pass_at_1")
        'support pass@1'
    """
    return name.replace("pass_at_", "pass@").replace("_", " ")


class Tally:
    """Adds up accuracy, reward and length over batches.

    pass@k averages over prompts whose completions were all judged by an accuracy reward. The mean
    reward is over all judged rows.

    Args:
        ks: the k of each pass@k.
        device: device of pass@k's counts, which are summed over processes.
    """

    def __init__(self, ks: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.passes = {k: PassAtK(k).to(device) for k in ks}
        self._reward = self._length = self._truncated = 0.0
        self._judged = 0
        self.rows = 0
        """Number of completions."""
        self.undecided = 0
        """Number of completions whose prompt does not count in pass@k."""

    def add(self, rollout: Rollout, scores: Scores, completions: int) -> None:
        """Take one batch of whole groups."""
        decided_P = scores.decided_B.view(-1, completions).all(1)
        correct_PG = scores.correct_B.view(-1, completions)[decided_P]
        for metric in self.passes.values():
            metric.update(correct_PG.to(metric.device))
        self.undecided += int((~decided_P).sum()) * completions
        self._judged += int(scores.judged_B.sum())
        self._reward += scores.rewards_B.sum().item()
        self._length += rollout.response_mask_BT.sum().item()
        self._truncated += rollout.finish_B.sum().item()
        self.rows += len(scores.rewards_B)

    def compute(self) -> dict[str, float]:
        """Return means by name, without pass@k if no prompt counts in it."""
        if not self.rows:
            return {}
        values = {
            f"pass_at_{k}": torch.as_tensor(metric.compute()).item()
            for k, metric in self.passes.items()
        }
        return {name: value for name, value in values.items() if not math.isnan(value)} | {
            "reward": self._reward / max(self._judged, 1),
            "judged": self._judged / self.rows,
            "length": self._length / self.rows,
            "truncated": self._truncated / self.rows,
        }
