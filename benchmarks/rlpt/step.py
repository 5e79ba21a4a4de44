"""The effect of promising tokens on a whole step: CPU seconds of RLPT against GRPO, in alternation.

    python benchmarks/rlpt/step.py --rounds 7 --data ../shared/data/svamp

SmolLM2 with LoRA, 8 prompts x 4 completions x 96 tokens (no end token, so that both do the same
work), two updates. Each run is a process of its own (`profile_step.py`); the least CPU time of each
variant counts, as other load only adds to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROFILE = Path(__file__).parents[1] / "profile_step.py"
VARIANTS = {"GRPO, whole vocabulary": ["--full-head"], "RLPT, K = 16": []}
TARGET = 1.03


def run(options: list[str]) -> dict[str, Any]:
    """Run one variant and return what it printed."""
    command = [
        sys.executable,
        str(PROFILE),
        "--actions",
        "token",
        "--fixed-length",
        "--learning-rate",
        "1e-9",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return least CPU time, its spread, peak memory and the ratio to the first variant, as Markdown."""
    lines = [
        "| variant | CPU seconds of a step (least) | all runs | ratio | peak memory |",
        "|---|---|---|---|---|",
    ]
    base: float | None = None
    for name, results in runs.items():
        seconds = sorted(result["cpu_seconds_per_step"] for result in results)
        base = base or seconds[0]
        memory = min(result["max_rss_mb"] for result in results)
        lines.append(
            f"| {name} | {seconds[0]:.2f} | {seconds[0]:.2f} to {seconds[-1]:.2f} | {seconds[0] / base:.3f} | {memory} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="runs of each variant")
    parser.add_argument(
        "--steps", type=int, default=1, help="rollouts that count in a run, after one that does not"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--data", default=None, help="SVAMP.json or its folder")
    options = parser.parse_args()
    common = ["--steps", str(options.steps), "--threads", str(options.threads)]
    common += ["--data", options.data] if options.data else []
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, own in VARIANTS.items():
            runs[name].append(run([*common, *own]))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    print(table(runs))
    grpo, rlpt = (min(r["cpu_seconds_per_step"] for r in results) for results in runs.values())
    print(
        f"RLPT costs {rlpt / grpo:.3f} x GRPO; the bound is {TARGET}: {'reached' if rlpt / grpo <= TARGET else 'missed'}"
    )


if __name__ == "__main__":
    main()
