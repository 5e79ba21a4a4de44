"""The picture of a study without stages."""

from __future__ import annotations

import math
from pathlib import Path

from comparing.plain import Study
from comparing.plain_table import differences_of
from comparing.statistics import interval


def draw(study: Study, path: Path) -> None:
    """Draw held-out pass@1 by task and cell, and below it the paired differences with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(study.cells)
    size = (max(5.5, 0.5 * len(names)) * len(study.tasks), 6)
    figure, panels = pyplot.subplots(
        2, len(study.tasks), figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    for column, task in enumerate(study.tasks):
        scores, gaps = panels[0][column], panels[1][column]
        for seed in study.seeds:
            finals = {
                i: s["final"] for i, c in enumerate(names) if (s := study.summary(task, c, seed))
            }
            values = [final["pass_at_1"] for final in finals.values()]
            if len(study.seeds) > 1:
                scores.plot(list(finals), values, "o-", ms=4, lw=0.7, label=f"seed {seed}")
            else:  # no spread over seeds: show what the number of problems leaves open
                bounds = [
                    [abs(b - f["pass_at_1"]) for b in f["pass_at_1_interval"]]
                    for f in finals.values()
                ]
                label = f"seed {seed}, 95 % interval over problems"
                scores.errorbar(
                    list(finals),
                    values,
                    list(zip(*bounds, strict=True)),
                    fmt="o",
                    ms=4,
                    capsize=4,
                    label=label,
                )
        for place, cell in enumerate(names):
            differences = differences_of(study, task, cell, study.cells[cell].get("against"))
            if differences:
                mean, half = interval(differences)
                gaps.plot(
                    [place] * len(differences), differences, "o", ms=4, color="tab:gray", alpha=0.6
                )
                error = 0 if math.isnan(half) else half
                gaps.errorbar(
                    place + 0.15, mean, yerr=error, fmt="D", ms=5, capsize=4, color="tab:red"
                )
        gaps.axhline(0, color="black", lw=0.8)
        gaps.set_xticks(range(len(names)), names, rotation=30, ha="right")
        scores.set(title=task, ylabel="held-out pass@1 after training")
        gaps.set(ylabel="difference from the base, by seed")
        for axes in (scores, gaps):
            axes.grid(alpha=0.3, axis="y")
        scores.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
