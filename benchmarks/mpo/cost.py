"""The cost of multi-token heads: parameters, step time and peak memory, with and without them.

    python benchmarks/mpo/cost.py --rounds 2 --steps 3 --data ../shared/data/svamp --out runs/mpo_cost

SmolLM2 with LoRA, 8 prompts x 4 completions x 96 tokens, two updates a rollout
(`benchmarks/profile_step.py`). Each run is a process of its own, and variants take turns. Learning
rates are so small that all variants sample the same responses. Ratios are of medians over rounds.
Blocks of 5 tokens: four parallel heads with the trunk's unembedding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PROFILE = Path(__file__).resolve().parents[1] / "profile_step.py"
HEADS = ["--actions", "mtp", "--length", "5"]
VARIANTS: dict[str, tuple[list[str], str | None]] = {
    "GRPO, support": (["--actions", "token"], None),
    "backbone blocks, support": (["--actions", "backbone", "--length", "5"], "GRPO, support"),
    "MPO, support": (HEADS, "GRPO, support"),
    "MPO, support, upkeep 0.1": ([*HEADS, "--upkeep", "0.1"], "GRPO, support"),
    "GRPO, full head": (["--actions", "token", "--full-head"], None),
    "MPO, full head": ([*HEADS, "--full-head"], "GRPO, full head"),
    "GRPO, full head, fp32": (["--actions", "token", "--full-head", "--base", "float32"], None),
    "MPO, full head, fp32": ([*HEADS, "--full-head", "--base", "float32"], "GRPO, full head, fp32"),
}
"""By name: options of `profile_step.py`, and the variant it is measured against."""


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one variant and return what it printed."""
    command = [
        sys.executable,
        str(PROFILE),
        "--steps",
        str(options.steps),
        "--threads",
        str(options.threads),
    ]
    command += ["--learning-rate", "1e-9", *VARIANTS[name][0]]
    if options.data:
        command += ["--data", options.data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, json.dumps(result), flush=True)
    return result


def summarise(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per variant: medians, and ratios to what it is measured against."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    rows = []
    for name in runs:
        against = VARIANTS[name][1]
        row: dict[str, Any] = {
            "variant": name,
            "trained": runs[name][0]["trained"],
            "parameters": runs[name][0]["parameters"],
            "step": median(name, "seconds_per_step"),
            "updates": median(name, "updates_seconds"),
            "memory": median(name, "max_rss_mb"),
            "ratios": statistics.median(
                run["shares"].get("ratios and surrogate", 0.0) for run in runs[name]
            ),
        }
        if against in runs:
            for key, source in (
                ("step", "seconds_per_step"),
                ("updates", "updates_seconds"),
                ("memory", "max_rss_mb"),
            ):
                row[f"{key} ratio"] = median(name, source) / median(against, source)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| variant | parameters | trained | step | ratio | scoring and updates | ratio | peak memory | ratio | "
        "ratios and surrogate, share of a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = {
            key: f"{row[f'{key} ratio']:.2f}x" if f"{key} ratio" in row else ""
            for key in ("step", "updates", "memory")
        }
        lines.append(
            f"| {row['variant']} | {row['parameters'] / 1e6:.1f} M | {row['trained'] / 1e6:.1f} M | {row['step']:.1f} s | "
            f"{ratios['step']} | {row['updates']:.1f} s | {ratios['updates']} | {row['memory']:.0f} MB | "
            f"{ratios['memory']} | {100 * row['ratios']:.2f} % |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw step time and peak memory of each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = [row["variant"] for row in rows]
    for axes, key, title, unit in (
        (panels[0], "step", "seconds of a step (one rollout, two updates)", "s"),
        (panels[1], "memory", "peak resident memory", "MB"),
    ):
        values = [row[key] for row in rows]
        bars = axes.barh(
            names,
            values,
            color=["tab:gray" if row["variant"].startswith("GRPO") else "tab:blue" for row in rows],
        )
        labels = [
            f"{row[key]:.0f} {unit}"
            + (f"  ({row[f'{key} ratio']:.2f}x)" if f"{key} ratio" in row else "")
            for row in rows
        ]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set(title=title, xlim=(0, 1.35 * max(values)))
        axes.invert_yaxis()
    panels[1].invert_yaxis()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument(
        "--steps", type=int, default=2, help="rollouts that count in a run, after one that does not"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", default=None, help="SVAMP.json or its folder")
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="only these"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mpo_cost"), help="folder of table and picture"
    )
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in runs:
            runs[name].append(run(name, options))
    rows = summarise(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (options.out / "cost.md").write_text(text + "\n")
    draw(rows, options.out / "cost.png")
    print(text)
    print(f"wrote {options.out / 'cost.md'} and {options.out / 'cost.png'}")


if __name__ == "__main__":
    main()
