"""Draws the course of runs from their `metrics.csv`: reward, length, entropy, KL and their like.

    python benchmarks/curves.py runs/qwen_svamp runs/qwen_svamp_rlpt --to curves.png

A thin line is the metric of each rollout. A thick line is its mean over the last rollouts
(`--window`, 8 by default). Without `--names` a run has the name of its folder.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import fmean

PANELS = {
    "reward/mean": "reward",
    "rollout/length": "length, tokens",
    "rollout/truncated": "share cut off",
    "policy/entropy": "entropy, nats a token",
    "kl/reference": "KL to the start, nats a token",
    "rollout/groups_flat": "share of groups without a signal",
}


def read(path: Path) -> dict[str, dict[int, float]]:
    """Return the values of each drawn metric by update; the last row of an update counts."""
    curves: dict[str, dict[int, float]] = {name: {} for name in PANELS}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, values in curves.items():
                if row.get(name):
                    values[int(row["step"])] = float(row[name])
    return curves


def smooth(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and the `window` - 1 before it, as far as they exist."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, Path], picture: Path, window: int) -> None:
    """Draw a panel for each metric with a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 5.5), layout="constrained", sharex=True)
    for place, (run, path) in enumerate(runs.items()):
        curves = read(path)
        for axes, (name, title) in zip(panels.flat, PANELS.items(), strict=True):
            updates, values = list(curves[name]), list(curves[name].values())
            color = f"C{place}"
            axes.plot(updates, values, color=color, lw=0.6, alpha=0.4)
            axes.plot(updates, smooth(values, window), color=color, lw=1.8, label=run)
            axes.set_title(title, fontsize=10)
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("update")
    panels[0][0].legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--names", nargs="+", metavar="NAME")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--to", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    names = options.names or [folder.name for folder in options.runs]
    if len(names) != len(options.runs):
        parser.error(f"{len(options.runs)} folders and {len(names)} names")
    files = [folder / "metrics.csv" for folder in options.runs]
    for file in files:
        if not file.is_file():
            parser.error(f"there is no {file}")
    draw(dict(zip(names, files, strict=True)), options.to, options.window)
    print(f"curves of {', '.join(names)} are in {options.to}")


if __name__ == "__main__":
    main()
