"""Tables of gains, with 95 % intervals whose unit is the file: lines of one file are alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lightning_mpo.functional.diagnostics import clustered_mean

Z = 1.96  # of a two-sided 95 % interval
OF_ANOTHER = "of another file"
"""Source of the comments that are a control."""
Record = dict[str, Any]


def gains(records: Sequence[Record], costs: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each kind of lines and source of thoughts.

    `gain` is the mean over thoughts that the reward uses, in nats per token of the line. Shares are
    of all thoughts: one that is not used is above no cost.
    """
    rows = []
    for lines, source in _sources(records):
        mine = [
            (record["file"], record["thoughts"][source])
            for record in records
            if record["lines"] == lines and source in record["thoughts"]
        ]
        every = [(file, one) for file, group in mine for one in group]
        row: dict[str, Any] = {
            "lines": lines,
            "thoughts": source,
            "number of lines": len(mine),
            "number of thoughts": len(every),
            "used": sum(one["usable"] for _, one in every) / len(every),
            **_interval("gain", ((file, one["gain"]) for file, one in every if one["usable"])),
        }
        for cost in costs:
            row[f"above {cost:g}"] = sum(_above(one, cost) for _, one in every) / len(every)
        for cost in costs:
            best = sum(any(_above(one, cost) for one in group) for _, group in mine) / len(mine)
            row[f"best above {cost:g}"] = best
        rows.append(row)
    return rows


def rewards(records: Sequence[Record], costs: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each kind of lines, policy and cost: the mean reward above that of an act.

        reward = mean over lines of P(think) · (mean gain - c)

    This is the mean of r - log p(a | s), without a penalty; it is 0 for a policy that never thinks.
    P(think) is the probability of the first token, so acts and thoughts are weighted, not drawn. A
    thought that is not used has gain 0. Comments of other files stand in front of every line. `r` is
    the mean reward itself.
    """
    rows = []
    for (lines, source), cost in itertools.product(_sources(records), costs):
        mine = [r for r in records if r["lines"] == lines and source in r["thoughts"]]
        if source != OF_ANOTHER and not all(source in r["thinks"] for r in mine):
            continue
        thinks = _interval("thinks", ((r["file"], _thinks(r, source)) for r in mine))
        added = _interval("reward", ((r["file"], _added(r, source, cost)) for r in mine))
        total = [r["likelihood"] + _added(r, source, cost) for r in mine]
        row = {"lines": lines, "thoughts": source, "cost": cost, "number of lines": len(mine)}
        rows.append({**row, **thinks, **added, "r": sum(total) / len(total)})
    return rows


def rises(records: Sequence[Record], costs: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each kind of lines and cost: the trained policy's reward less another one.

    The others are those of the base, and of a comment of another file in front of every line.
    """
    rows = []
    for lines, cost in itertools.product(dict.fromkeys(r["lines"] for r in records), costs):
        mine = [r for r in records if r["lines"] == lines and "trained" in r["thoughts"]]
        for other in ("sampled", OF_ANOTHER) if mine else ():
            pairs = ((r["file"], _added(r, "trained", cost) - _added(r, other, cost)) for r in mine)
            row = {"lines": lines, "cost": cost, "reward": f"trained - {other}"}
            rows.append({**row, **_interval("difference", pairs)})
    return rows


def differences(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each pair of sources of the same lines: the mean difference of their gains.

    A thought that is not used has gain 0, as in the reward.
    """
    rows = []
    kinds = sorted({record["lines"] for record in records})
    for lines in kinds:
        sources = [source for kind, source in _sources(records) if kind == lines]
        for second, first in itertools.combinations(sources, 2):
            pairs = (
                (record["file"], _mean(record, first) - _mean(record, second))
                for record in records
                if record["lines"] == lines and {first, second} <= set(record["thoughts"])
            )
            row = {"lines": lines, "thoughts": f"{first} - {second}"}
            rows.append({**row, **_interval("difference", pairs)})
    return rows


def _sources(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return kinds of lines and sources of thoughts, in their first order."""
    return list(
        dict.fromkeys((record["lines"], name) for record in records for name in record["thoughts"])
    )


def _used(one: dict[str, Any]) -> float:
    return one["gain"] if one["usable"] else 0.0


def _above(one: dict[str, Any], cost: float) -> bool:
    return one["usable"] and one["gain"] > cost


def _mean(record: Record, source: str) -> float:
    """Return the mean gain of the thoughts of one line."""
    group = record["thoughts"][source]
    return sum(map(_used, group)) / len(group)


def _thinks(record: Record, source: str) -> float:
    """Return the probability of a thought; comments of other files stand in front of every line."""
    return 1.0 if source == OF_ANOTHER else float(record["thinks"][source])


def _added(record: Record, source: str, cost: float) -> float:
    """Return E[r] - log p(a | s) of a line: the gain of thoughts less their cost, if it thinks."""
    return _thinks(record, source) * (_mean(record, source) - cost)


def _interval(name: str, values: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Return the mean of values of files, and its interval."""
    return interval(name, ((file, value, 1) for file, value in values))


def interval(name: str, values: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    """Return the mean over tokens, lines or thoughts, and the bounds of its interval.

    Args:
        name: of the column.
        values: file, a sum over some of its tokens, and how many they are. The unit of the
            interval is the file.
    """
    totals: dict[str, list[float]] = {}
    for file, value, count in values:
        total = totals.setdefault(file, [0.0, 0.0])
        total[0] += value
        total[1] += count
    totals_P2 = torch.tensor(list(totals.values()), dtype=torch.float64).reshape(-1, 2)
    mean, error = clustered_mean(*totals_P2.unbind(1))
    return {name: mean, f"{name} low": mean - Z * error, f"{name} high": mean + Z * error}
