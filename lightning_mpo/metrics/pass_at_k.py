"""pass@k (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1)."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PassAtK(Metric):
    """Probability that at least one of k completions of a problem is right, averaged over problems.

    Unbiased from n ≥ k completions of which c are right: 1 − C(n−c, k) / C(n, k), in float64.

    Args:
        k: completions that a problem may take.
        kwargs: as for `torchmetrics.Metric`.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[True, False, False], [True, True, False]]))
        >>> round(metric.compute().item(), 4)
        0.8333
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    problems: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}")
        self.k = k
        for state in ("problems", "total", "squares"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correct_PG: Tensor) -> None:
        """Add problems.

        Args:
            correct_PG: which completions of each problem are right, bool. Shape `[P, G]`, G ≥ k.

        Raises:
            ValueError: no bool, no matrix, or fewer than k completions.
        """
        if correct_PG.dtype != torch.bool or correct_PG.ndim != 2:
            raise ValueError(
                f"`correct_PG` must be bool of shape [P, G], got {correct_PG.dtype} of "
                f"{tuple(correct_PG.shape)}"
            )
        n = correct_PG.shape[1]
        if n < self.k:
            raise ValueError(
                f"`correct_PG` must hold at least k = {self.k} completions per problem, got {n}"
            )
        wrong_P = (~correct_PG).sum(1, dtype=torch.float64)
        drawn_k = torch.arange(self.k, dtype=torch.float64, device=correct_PG.device)
        # C(n−c, k) / C(n, k): all k draws without replacement are wrong; 0 if fewer than k are
        estimates_P = 1 - ((wrong_P[:, None] - drawn_k) / (n - drawn_k)).prod(1)
        self.problems += len(estimates_P)
        self.total += estimates_P.sum()
        self.squares += estimates_P.square().sum()

    def compute(self) -> Tensor:
        """Return the mean over problems, nan without any."""
        return self.total / self.problems

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval of the mean, over all ranks: mean ± z·s/√P, cut to [0, 1].

        The unit is the problem, also at k = 1: completions of one problem are alike, and counting
        each as an observation would promise too much. Where all problems score alike (s = 0, so
        often all right or all wrong) it is Wilson's interval with P trials, which does not shrink
        to a point.

        Args:
            level: probability that it covers the true mean, if problems are drawn at random.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must lie between 0 and 1, got {level}")
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn
        ):
            P, total, squares = self.problems.item(), self.total.item(), self.squares.item()
        if not P:
            return math.nan, math.nan
        z, mean = NormalDist().inv_cdf((1 + level) / 2), total / P
        variance = (squares - total * mean) / (P - 1) if P > 1 else 0.0
        if variance > 1e-12:
            centre, half = mean, z * math.sqrt(variance / P)
        else:
            centre = (mean + z * z / (2 * P)) / (1 + z * z / P)
            half = z / (1 + z * z / P) * math.sqrt(mean * (1 - mean) / P + (z / (2 * P)) ** 2)
        # rounding must not put the mean outside
        return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
