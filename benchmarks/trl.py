"""Compares a run of ours with TRL's GRPOTrainer on the same work, in alternating child processes.

    python benchmarks/trl.py --rounds 2 --data ../shared/data/svamp

Prints the median step and the peak memory of each side and their ratios. Only ratios carry over to
other machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side and return what it printed."""
    command = [sys.executable, str(HERE / f"peer_{name}.py"), "--steps", str(arguments.steps)]
    command += ["--threads", str(arguments.threads)]
    if arguments.data:
        command += ["--data", arguments.data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps that count in a run")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", default=None, help="SVAMP.json or its folder")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(arguments.rounds):
        for name, runs in results.items():
            runs.append(child(name, arguments))
    seconds = {
        name: statistics.median(s for run in runs for s in run["step_seconds"])
        for name, runs in results.items()
    }
    memory = {name: max(run["max_rss_mb"] for run in runs) for name, runs in results.items()}
    print(
        f"median step   ours {seconds['ours']:.1f} s, TRL {seconds['trl']:.1f} s: {seconds['ours'] / seconds['trl']:.2f}x"
    )
    print(
        f"peak memory   ours {memory['ours']} MB, TRL {memory['trl']} MB: {memory['ours'] / memory['trl']:.2f}x"
    )


if __name__ == "__main__":
    main()
