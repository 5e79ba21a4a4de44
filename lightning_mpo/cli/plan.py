"""The verb `plan`: a table of predicted memory, what fits a GPU, and a measured step beside it."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.plan_parser import build
from lightning_mpo.errors import UserError

MIB, GIB = 2**20, 2**30
CONTEXT = 0.6
"""GiB that CUDA's context and the allocator's fragments take of a GPU. A guess."""
MICRO_ROWS = (1, 2, 4, 8, 16, 32)
TOLERANCE = 0.15


def table(phases: dict[str, dict[str, int]]) -> str:
    """Return parts by phase, in MiB, as text."""
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    parts = [part for part in parts if any(phase.get(part) for phase in phases.values())]
    lines = [f"{'MiB':<18}" + "".join(f"{name:>11}" for name in phases)]
    for part in parts:
        lines.append(
            f"{part:<18}"
            + "".join(f"{phase.get(part, 0) / MIB:>11.1f}" for phase in phases.values())
        )
    lines.append(
        f"{'sum':<18}" + "".join(f"{sum(phase.values()) / MIB:>11.1f}" for phase in phases.values())
    )
    return "\n".join(lines)


def fitting(planner: Any, gib: float) -> str:
    """Say which micro-batches, and how many sequences sampled at once, fit a GPU."""
    planner.gpu = True
    room = (gib - CONTEXT) * GIB
    rows = sorted({n for n in (*MICRO_ROWS, planner.sizes.micro_rows) if n <= planner.sizes.rows})
    updates = {n: planner.update(micro_rows=n) for n in rows}
    G = planner.sizes.completions
    together = sorted(
        {n for n in (G, 2 * G, 4 * G, 8 * G, planner.sizes.rows) if n <= planner.sizes.rows}
    )
    rollouts = {n: planner.rolling(together=n) for n in together}
    lines = [f"of {gib:g} GiB, {CONTEXT:g} are left to CUDA itself (predicted, not measured)"]
    for what, sizes in (
        ("rows of a micro-batch", updates),
        ("sequences sampled at once", rollouts),
    ):
        said = ", ".join(
            f"{n}: {size / GIB:.2f} GiB{'' if size <= room else ' (too much)'}"
            for n, size in sizes.items()
        )
        lines.append(f"{what}: {said}")
    best, most = (
        max((n for n, s in sizes.items() if s <= room), default=0) for sizes in (updates, rollouts)
    )
    if not best or not most:
        return "\n".join(
            [
                *lines,
                "nothing fits: take a smaller model, `policy.quantization`, or shorter responses",
            ]
        )
    cuts = -(-planner.sizes.rows // planner.minibatches // best)
    lines.append(
        f"fits: trainer.accumulate_grad_batches {cuts} (micro-batches of {best} rows), "
        f"rollout.sampler LocalSampler(batch_size: {most}) for rollouts of {planner.sizes.rows}"
    )
    return "\n".join(lines)


def check(arguments: Sequence[str], peaks: dict[str, int]) -> tuple[str, float]:
    """Run two rollouts in a process of its own; return predicted beside measured, and the deviation of the peak."""
    command = [sys.executable, "-m", "lightning_mpo.cli.plan_check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise UserError(f"the dry step failed with exit code {done.returncode}: {last}")
    measured = json.loads(done.stdout.splitlines()[-1])
    in_use, held = measured["in_use"], measured["held"]
    lines = [f"{'MiB':<18}{'predicted':>11}{'measured':>11}{'held':>11}"]
    for phase, size in peaks.items():
        lines.append(
            f"{phase:<18}{size / MIB:>11.1f}{in_use[phase] / MIB:>11.1f}{held[phase] / MIB:>11.1f}"
        )
    most, found, kept = (
        max(peaks.values()),
        *(max(sizes[phase] for phase in peaks) for sizes in (in_use, held)),
    )
    off = most / found - 1
    lines.append(
        f"{'peak':<18}{most / MIB:>11.1f}{found / MIB:>11.1f}{kept / MIB:>11.1f}   {off:+.1%}"
    )
    lines.append(
        "measured: without what the allocator keeps of freed memory, which is in `held`; "
        f"while loading {held['load'] / MIB:.1f} MiB, file pages that the system can take back included"
    )
    return "\n".join(lines), off


def _check_room(peak: int, device: torch.device) -> None:
    """Refuse to run what the machine cannot hold."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if peak > room:
        raise UserError(
            f"`--check` runs two rollouts, for which {peak / GIB:,.1f} GiB are predicted, and this machine has {room / GIB:,.1f} "
            "GiB: leave `--check` out, or take a smaller model"
        )


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo plan`; return the exit code: 1 where a check is further off than 15 %."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpo plan",
        description="Predict the peak memory of a run by part, from its configuration; other options are those of `fit`.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--gpu-gib", type=float, metavar="GIB", help="say what fits a GPU of this size"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run a rollout, its updates and a second rollout, and compare",
    )
    outcome: list[int] = []
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            return (
                guarded(lambda: outcome.append(_plan(*parser.parse_known_args(arguments))))
                or outcome[0]
            )
    finally:
        logger.setLevel(level)


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    if not rest:
        raise UserError("`plan` needs a configuration: lightning-mpo plan -c quickstart")
    if options.gpu_gib is not None and not CONTEXT < options.gpu_gib < math.inf:
        raise UserError(
            f"`--gpu-gib` must be above {CONTEXT:g} and finite, got {options.gpu_gib:g}"
        )
    from lightning_mpo.plan.predict import Planner

    planner = Planner(*build(rest))
    prediction = planner.predict()
    sizes = prediction.sizes
    print(
        f"{sizes.rows} sequences of {sizes.prompt} + {sizes.response} tokens, micro-batches of {sizes.micro_rows} "
        "rows; predicted peaks by phase, above the process itself"
    )
    print(table(prediction.phases))
    print("\n".join(planner.notes()))
    if options.gpu_gib is not None:
        print(fitting(planner, options.gpu_gib))
    if not options.check:
        return 0
    _check_room(max(prediction.peaks.values()), planner.trainer.strategy.root_device)
    said, off = check(rest, prediction.peaks)
    print(said)
    if abs(off) > TOLERANCE:
        print(f"exit code 1: the predicted peak is off by more than {TOLERANCE:.0%}")
    return int(abs(off) > TOLERANCE)
