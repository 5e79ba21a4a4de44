"""Results of an evaluation, gathered by problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mpo.functional.evaluation import (
    majority_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
)

COLUMNS = (
    *("problem", "sample", "decided", "right", "judged", "answered", "reward", "length"),
    *("truncated", "vote"),
)
"""Columns of the state, in which a completion is a row."""
BOUNDS = {"reward": (-math.inf, math.inf), "length": (0.0, math.inf)}
"""Least and largest value of a problem, for results that are no shares."""


class ProblemResults(Metric):
    """Accuracy, reward, length and form of completions, each with a 95 % interval over problems.

    `pass_at_{k}` and `maj_at_{k}` are means over the problems that an accuracy reward judged in
    full, and are absent without one. `maj_at_{k}` is there for k above 1 and rewards that give
    their answers as text. The other results are `reward` and `answered` of judged completions, `judged`,
    `length` in tokens and `truncated`.

    A problem that several processes had counts once, so that the padding of a distributed sampler
    changes nothing.

    Args:
        ks: numbers of completions that a problem may take, for pass@k and maj@k.
        kwargs: as for `torchmetrics.Metric`.

    Example:
        >>> sample = {"answered": True, "reward": 1.0, "length": 9, "truncated": False}
        >>> samples = [sample | {"right": right} for right in (True, False)]
        >>> metric = ProblemResults(ks=[1, 2])
        >>> metric.update([{"problem": 0, "samples": samples}])
        >>> {name: mean for name, (mean, low, high) in metric.results().items()}["pass_at_1"]
        0.5
    """

    is_differentiable = False
    full_state_update = False
    samples: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ValueError(f"`ks` must be numbers of at least 1, got {list(ks)}")
        self.ks = sorted(set(ks))
        self.add_state("samples", [], dist_reduce_fx="cat")

    def update(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """Add problems, each with all its completions.

        Args:
            problems: `problem`, its number, and `samples`, a list with an entry per completion:
                `right` (None: undecided), `answered`, `reward` (None: not judged), `length` in
                tokens, `truncated`, and `answer` (None: no vote) if rewards give answers.

        Raises:
            ValueError: a problem has fewer completions than the largest k.
        """
        rows = [row for problem in problems for row in _rows(problem, self.ks[-1])]
        if rows:
            self.samples.append(torch.tensor(rows, dtype=torch.float64, device=self.device))

    def values(self) -> dict[str, Tensor]:
        """Return each result by problem, in the order of their numbers; NaN: it has none.

        `problem` holds the numbers. These are the problems of this process alone.

        Raises:
            ValueError: problems have different numbers of completions.
        """
        table_PGC = self._table()
        column = {name: table_PGC[..., i] for i, name in enumerate(COLUMNS)}
        G = table_PGC.shape[1]
        judged_PG = column["judged"]
        counts_P = judged_PG.sum(1)
        values = {"problem": column["problem"][:, 0]}
        # accuracy, of problems that are decided in full
        decided_P = column["decided"].bool().all(1)
        if bool(decided_P.any()):
            right_P = column["right"][decided_P].sum(1)
            votes_PG = column["vote"][decided_P]
            has_votes = not bool(votes_PG.isnan().any())
            for k in self.ks:
                values[f"pass_at_{k}"] = _spread(
                    pass_at_k(right_P, torch.full_like(right_P, G), k), decided_P
                )
                if k > 1 and has_votes:
                    values[f"maj_at_{k}"] = _spread(majority_at_k(votes_PG.long(), k), decided_P)
        # of judged completions, and of all
        for name in ("reward", "answered"):
            values[name] = (column[name] * judged_PG).sum(1) / counts_P
        return values | {name: column[name].mean(1) for name in ("judged", "length", "truncated")}

    def compute(self) -> dict[str, Tensor]:
        """Return mean, lower and upper end by name, over the problems of all processes."""
        if isinstance(self.samples, list) and not self.samples:  # a tensor if it is gathered
            return {}
        return {
            name: mean_interval(values_P[~values_P.isnan()], *BOUNDS.get(name, (0.0, 1.0)))
            for name, values_P in self.values().items()
            if name != "problem" and not bool(values_P.isnan().all())
        }

    def results(self) -> dict[str, list[float]]:
        """Return `compute` as plain numbers."""
        return {name: result.tolist() for name, result in self.compute().items()}

    def undecided(self) -> tuple[int, int]:
        """Return (completions of problems that are not decided in full, completions)."""
        table_PGC = self._table()
        P, G = table_PGC.shape[:2]
        decided_P = table_PGC[..., COLUMNS.index("decided")].bool().all(1)
        return int((~decided_P).sum()) * G, P * G

    def _table(self) -> Tensor:
        """Return the state by problem and completion, without repeated ones, on the CPU."""
        table = dim_zero_cat(self.samples).cpu()
        problem, sample = table[:, 0], table[:, 1]
        G = int(sample.max()) + 1
        # a stable order, so that repetitions follow each other
        key, order = (problem * G + sample).sort(stable=True)
        first = torch.cat([torch.ones(1, dtype=torch.bool), key.diff() > 0])
        table = table[order][first]
        if len(table) != G * int(table[:, 0].diff().bool().sum() + 1):
            raise ValueError(f"all problems must have {G} completions, as one of them has")
        return table.view(-1, G, len(COLUMNS))


def paired(first: ProblemResults, second: ProblemResults) -> dict[str, list[float]]:
    """Return mean of second − first, lower and upper end by name, over the problems of both.

    A result that one of them does not have is left out, and so is a problem without a value in one.

    Raises:
        ValueError: they are of different problems.
    """
    before, after = first.values(), second.values()
    if not torch.equal(before.pop("problem"), after.pop("problem")):
        raise ValueError("`first` and `second` must hold the same problems")
    differences = {}
    for name, first_P in before.items():
        if name not in after:
            continue
        both_P = ~(first_P.isnan() | after[name].isnan())
        if not bool(both_P.any()):
            continue
        pair = first_P[both_P], after[name][both_P]
        differences[name] = (
            mean_interval(pair[1] - pair[0], -math.inf, math.inf)
            if name in BOUNDS
            else paired_difference(*pair)
        ).tolist()
    return differences


def _spread(values_D: Tensor, decided_P: Tensor) -> Tensor:
    """Return values of decided problems among all problems; NaN for the others."""
    values_P = torch.full(decided_P.shape, torch.nan, dtype=torch.float64)
    values_P[decided_P] = values_D
    return values_P


def _rows(problem: Mapping[str, Any], most: int) -> list[list[float]]:
    """Return a row of the state for each completion of a problem."""
    samples = problem["samples"]
    if len(samples) < most:
        raise ValueError(
            f"`problems` must hold at least k = {most} completions each, got {len(samples)}"
        )
    kinds: dict[str, int] = {}
    return [
        [
            problem["problem"],
            position,
            sample["right"] is not None,
            bool(sample["right"]),
            sample["reward"] is not None,
            sample["answered"],
            sample["reward"] or 0.0,
            sample["length"],
            sample["truncated"],
            _vote(sample, kinds),
        ]
        for position, sample in enumerate(samples)
    ]


def _vote(sample: Mapping[str, Any], kinds: dict[str, int]) -> float:
    """Return 0 for a right answer, the number of a wrong one, −1 for none; NaN: it is not known.

    A response that was cut off has no vote.
    """
    if "answer" not in sample:
        return math.nan
    if sample["right"]:
        return 0
    if sample["answer"] is None or sample["truncated"]:
        return -1
    return kinds.setdefault(sample["answer"], len(kinds) + 1)
