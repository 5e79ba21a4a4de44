"""Draws the course of runs from their `metrics.csv`: reward, length, entropy, KL and their like.

    python benchmarks/curves.py runs/qwen_svamp runs/qwen_svamp_rlpt --to curves.png
    python benchmarks/curves.py runs/a runs/b --metrics reward/next_line_likelihood reward/thinks

A thin line is the metric of each rollout. A thick line is its mean over the last rollouts
(`--window`, 8 by default). Without `--names` a run has the name of its folder. `--metrics` chooses
the columns of `metrics.csv`, a panel each.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

TITLES = {
    "reward/mean": "reward",
    "rollout/length": "length, tokens",
    "rollout/truncated": "share cut off",
    "policy/entropy": "entropy, nats a token",
    "kl/reference": "KL to the start, nats a token",
    "rollout/groups_flat": "share of groups without a signal",
    "reward/next_line_likelihood": "reward, nats a token of the line",
    "reward/thinks": "share of responses that think",
    "reward/usable_thought": "share of thoughts that are used",
}
PANELS = tuple(TITLES)[:6]
"""The metrics that are drawn without `--metrics`."""
Curves = dict[str, dict[int, float]]


def read(path: Path, metrics: Iterable[str] = PANELS) -> Curves:
    """Return the values of metrics by update; the last row of an update counts."""
    curves: Curves = {name: {} for name in metrics}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, values in curves.items():
                if row.get(name):
                    values[int(row["step"])] = float(row[name])
    return curves


def smooth(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and the `window` - 1 before it, as far as they exist."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, Curves], picture: Path, window: int) -> None:
    """Draw a panel for each metric with a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(next(iter(runs.values())))
    columns = min(3, len(metrics))
    height = -(-len(metrics) // columns)
    figure, panels = pyplot.subplots(
        *(height, columns),
        figsize=(11 / 3 * columns, 2.75 * height),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for axes, name in zip(panels.flat, metrics, strict=False):
        lowest = 0.0
        for place, (run, curves) in enumerate(runs.items()):
            updates, values = list(curves[name]), list(curves[name].values())
            color = f"C{place}"
            axes.plot(updates, values, color=color, lw=0.6, alpha=0.4)
            axes.plot(updates, smooth(values, window), color=color, lw=1.8, label=run)
            lowest = min([lowest, *values])
        axes.set_title(TITLES.get(name, name), fontsize=10)
        if not lowest < 0:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    # the lowest panel of each column has the label; a place without a metric has nothing
    for i, axes in enumerate(panels.flat):
        if i >= len(metrics):
            axes.set_axis_off()
        elif i >= len(metrics) - columns:
            axes.set_xlabel("update")
            axes.tick_params(labelbottom=True)
    panels[0][0].legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--names", nargs="+", metavar="NAME")
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", default=PANELS)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--to", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    names = options.names or [folder.name for folder in options.runs]
    if len(names) != len(options.runs):
        parser.error(f"{len(options.runs)} folders and {len(names)} names")
    if len(set(names)) < len(names):
        parser.error("two runs have the same name; give --names")
    files = [folder / "metrics.csv" for folder in options.runs]
    for file in files:
        if not file.is_file():
            parser.error(f"there is no {file}")
    runs = {name: read(file, options.metrics) for name, file in zip(names, files, strict=True)}
    for metric in options.metrics if options.metrics is not PANELS else ():
        without = [name for name, curves in runs.items() if not curves[metric]]
        if len(without) == len(runs):
            parser.error(f"no run has the metric {metric}")
        if without:
            print(f"{', '.join(without)}: no values of {metric}")
    draw(runs, options.to, options.window)
    print(f"curves of {', '.join(names)} are in {options.to}")


if __name__ == "__main__":
    main()
