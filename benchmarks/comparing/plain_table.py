"""The table of a study without stages, as Markdown."""

from __future__ import annotations

import math
import statistics
from typing import Any

from comparing.plain import Study
from comparing.statistics import detectable, interval


def rollouts_to(summary: dict[str, Any], level: float) -> float | None:
    """Return the number of rollouts until held-out pass@1 reaches a level, interpolated between validations."""
    seen, before, reached = 0, (0, summary["warmup"]["pass_at_1"]), None
    for point in summary["curve"]:
        seen += "accuracy" in point
        if "validation" in point and reached is None:
            now = (seen, point["validation"])
            if now[1] >= level:
                rise = (level - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 0.0
                reached = before[0] + max(rise, 0.0) * (now[0] - before[0])
            before = now
    return reached


def _reach(
    summaries: dict[int, dict[str, Any]],
    level: float,
    base: dict[int, dict[str, Any]] | None = None,
) -> str:
    """Return the mean over seeds that reach a level, the number of the others, and the paired difference from a base."""
    counts = {seed: rollouts_to(summary, level) for seed, summary in summaries.items()}
    there = [count for count in counts.values() if count is not None]
    missed = f" ({len(counts) - len(there)} never)" if len(there) < len(counts) else ""
    text = (f"{statistics.mean(there):.1f}" if there else "") + missed
    others = {seed: rollouts_to(summary, level) for seed, summary in (base or {}).items()}
    gaps = [
        count - others[seed]
        for seed, count in counts.items()
        if count is not None and others.get(seed) is not None
    ]
    return f"{text}, paired {_show(*interval(gaps), sign=True, digits=1)}" if gaps else text


def table(study: Study) -> str:
    """Return the results as Markdown, with the memory of updates if runs have `MemoryAccounting`."""
    memory = {
        (task, cell): study.update_memory(task, cell)
        for task in study.tasks
        for cell in study.cells
    }
    measured = any(memory.values())
    more = " peak of the update |" if measured else ""
    more += "".join(f" rollouts to {level:g} |" for level in study.levels)
    lines = [
        "| task | cell | seeds | pass@1 | on the support | greedy | gain over warm-up | paired difference in pass@1 | "
        "detectable (80 %) | clip fraction | KL | update time |" + more,
        "|---" * (12 + more.count("|")) + "|",
    ]
    for task in study.tasks:
        for cell, options in study.cells.items():
            summaries = study.summaries(task, cell)
            if not summaries:
                continue
            base = study.summaries(task, options["against"]) if "against" in options else None
            support = [
                s["final"]["support_pass_at_1"]
                for s in summaries.values()
                if "support_pass_at_1" in s["final"]
            ]
            final = [s["final"]["pass_at_1"] for s in summaries.values()]
            gains = [s["final"]["pass_at_1"] - s["warmup"]["pass_at_1"] for s in summaries.values()]
            greedy = statistics.mean(s["final"]["greedy_accuracy"] for s in summaries.values())
            differences = differences_of(study, task, cell, options.get("against"))
            lines.append(
                f"| {task} | {cell} | {len(summaries)} | {_show(*interval(final))} | "
                + (f"{statistics.mean(support):.3f} | " if support else "| ")
                + f"{greedy:.3f} | {_show(*interval(gains))} | "
                + (
                    f"{_show(*interval(differences), sign=True)} | {detectable(differences):.3f} | "
                    if differences
                    else "| | "
                )
                + f"{statistics.mean(s['final']['clip_fraction'] for s in summaries.values()):.4f} | "
                + f"{statistics.mean(s['final']['kl'] for s in summaries.values()):.4f} | "
                + f"{statistics.mean(s['seconds']['training'] / s['updates'] for s in summaries.values()):.2f} s |"
                + (f" {_mebibytes(memory[task, cell])} |" if measured else "")
                + "".join(f" {_reach(summaries, level, base)} |" for level in study.levels)
            )
    return "\n".join(lines)


def differences_of(study: Study, task: str, cell: str, against: str | None) -> list[float]:
    """Return the differences in pass@1 between a cell and its base, for seeds that both have."""
    if against is None:
        return []
    ours, base = study.summaries(task, cell), study.summaries(task, against)
    return [
        s["final"]["pass_at_1"] - base[seed]["final"]["pass_at_1"]
        for seed, s in ours.items()
        if seed in base
    ]


def _mebibytes(sizes: list[int]) -> str:
    return f"{statistics.mean(sizes) / 2**20:.0f} MiB" if sizes else ""


def _show(mean: float, half: float, sign: bool = False, digits: int = 3) -> str:
    value = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return value if math.isnan(half) else f"{value} ± {half:.{digits}f}"
