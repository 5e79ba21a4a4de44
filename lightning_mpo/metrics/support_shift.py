"""The table of support shift, from scores or from answers to the same problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.evaluation import mean_interval, paired_difference, pass_at_k
from lightning_mpo.functional.support_shift import (
    expansion_ratio,
    expansion_ratio_interval,
    shift,
    solved,
)

PARTS = ("preserved", "expansion", "shrinkage", "out_of_support")


@dataclass(frozen=True)
class Judge:
    """What counts as a solution.

    Args:
        reward: name of the reward in the answers, such as `peptide_design`; None: the right answers
            of the accuracy rewards.
        threshold: least score of a solution; not read without `reward`.
    """

    reward: str | None = None
    threshold: float = 0.5

    def __str__(self) -> str:
        return "right" if self.reward is None else f"{self.reward} ≥ {self.threshold:g}"

    def scores(self, problems: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the score of each sample, NaN where nothing judged it. Shape `[P, G]`.

        Raises:
            UserError: the answers have no such reward.
        """
        rows = [[self._score(sample) for sample in problem["samples"]] for problem in problems]
        return torch.tensor(rows, dtype=torch.float64)

    def _score(self, sample: Mapping[str, Any]) -> float:
        if self.reward is None:
            value = sample["right"]
        else:
            scores = sample.get("scores", {})
            if self.reward not in scores:
                there = f"there are {', '.join(scores)}" if scores else "they hold no scores"
                raise UserError(
                    f"the answers have no scores of the reward {self.reward!r}: {there}; scores "
                    "are written for two rewards or more"
                )
            value = scores[self.reward]
        return math.nan if value is None else float(value)


def support_shift(
    base_PG: Tensor, trained_PG: Tensor, threshold: float, k: int
) -> dict[str, list[float]]:
    """Return the results of support shift, each as value, lower and upper end.

    * `preserved`, `expansion`, `shrinkage`, `out_of_support`: shares of the contexts.
    * `esr`: expansion over shrinkage.
    * `base_any`, `trained_any`: contexts that one of the first k samples solves.
    * `base_pass`, `trained_pass`: pass@k, unbiased over all G samples; `pass_difference`: paired.

    Args:
        base_PG: scores of the base policy, shape `[P, G]`.
        trained_PG: scores of the trained policy for the same contexts, shape `[P, H]`.
        threshold: least score of a solution.
        k: samples that a context may take.
    """
    before_P, after_P = (solved(scores, threshold, k) for scores in (base_PG, trained_PG))
    parts = shift(before_P, after_P)
    counts = {name: int(part_P.sum()) for name, part_P in parts.items()}
    pair = counts["expansion"], counts["shrinkage"]
    results = {name: mean_interval(part_P).tolist() for name, part_P in parts.items()}
    results["esr"] = [expansion_ratio(*pair), *expansion_ratio_interval(*pair)]
    for name, solved_P in (("base_any", before_P), ("trained_any", after_P)):
        results[name] = mean_interval(solved_P.double()).tolist()
    passes = []
    for name, scores in (("base_pass", base_PG), ("trained_pass", trained_PG)):
        right_P = (scores >= threshold).double().sum(1)
        passes.append(pass_at_k(right_P, torch.full_like(right_P, scores.shape[1]), k))
        results[name] = mean_interval(passes[-1]).tolist()
    return results | {"pass_difference": paired_difference(passes[0], passes[1]).tolist()}
