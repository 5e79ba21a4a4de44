"""`lightning-mpo plan`: predicted memory, sizes that fit a GPU, and a measured run to compare."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.plan_objects import build, without_notes
from lightning_mpo.errors import UserError

MIB, GIB = 2**20, 2**30
CONTEXT = 0.6
"""GiB of a GPU that CUDA's context and fragments of the allocator take. A guess."""
MICRO_ROWS = (1, 2, 4, 8, 16, 32)
"""Sizes of micro-batches that are tried."""
TOLERANCE = 0.15
"""Largest deviation of the predicted peak from the measured one, as a share of the latter."""


def table(phases: dict[str, dict[str, int]]) -> str:
    """Return predicted memory as text.

    Args:
        phases: bytes by phase and part.
    """
    all_parts = dict.fromkeys(part for phase in phases.values() for part in phase)
    rows = [(part, [phase.get(part, 0) for phase in phases.values()]) for part in all_parts]
    rows = [(part, sizes) for part, sizes in rows if any(sizes)]
    rows.append(("sum", [sum(phase.values()) for phase in phases.values()]))
    lines = [f"{'MiB':<18}" + "".join(f"{name:>11}" for name in phases)]
    lines += [f"{name:<18}" + "".join(f"{n / MIB:>11.1f}" for n in sizes) for name, sizes in rows]
    return "\n".join(lines)


def fitting(planner: Any, gib: float) -> str:
    """Return the micro-batches, and the numbers of sequences sampled at once, that fit a GPU.

    Args:
        planner: a `Planner`.
        gib: memory of the GPU in GiB.
    """
    # predicted bytes of each size
    planner.gpu = True
    room = (gib - CONTEXT) * GIB
    sizes = planner.sizes
    total, G, trained = sizes.rows, sizes.completions, sizes.trained_rows
    micro_rows = sorted({n for n in (*MICRO_ROWS, sizes.micro_rows) if n <= trained})
    updates = {n: planner.update(micro_rows=n) for n in micro_rows}
    together = sorted({n for n in (G, 2 * G, 4 * G, 8 * G, total) if n <= total})
    rollouts = {n: planner.rolling(together=n) for n in together}
    # list them
    lines = [f"of {gib:g} GiB, {CONTEXT:g} are left to CUDA itself (predicted, not measured)"]
    for title, predicted in (
        ("rows of a micro-batch", updates),
        ("sequences sampled at once", rollouts),
    ):
        listed = (
            f"{n}: {size / GIB:.2f} GiB{'' if size <= room else ' (too much)'}"
            for n, size in predicted.items()
        )
        lines.append(f"{title}: {', '.join(listed)}")
    # the largest sizes that fit, as options
    best_micro, best_together = (
        max((n for n, size in predicted.items() if size <= room), default=0)
        for predicted in (updates, rollouts)
    )
    if not best_micro or not best_together:
        advice = "take a smaller model, `policy.quantization`, or shorter responses"
        return "\n".join([*lines, f"nothing fits: {advice}"])
    cuts = -(-trained // planner.minibatches // best_micro)
    sampler = type(planner.rollout.sampler).__name__
    lines.append(
        f"fits: trainer.accumulate_grad_batches {cuts} (micro-batches of {best_micro} rows), "
        f"rollout.sampler {sampler}(batch_size: {best_together}) for rollouts of {total}"
    )
    return "\n".join(lines)


def check(arguments: Sequence[str], peaks: dict[str, int]) -> tuple[str, float]:
    """Run two rollouts in a separate process, and compare their memory with the prediction.

    Args:
        arguments: of the command line, without a verb.
        peaks: predicted bytes by phase.

    Returns:
        A table of predicted and measured memory, and the deviation of the predicted peak.

    Raises:
        UserError: the process failed.
    """
    # measure
    command = [sys.executable, "-m", "lightning_mpo.cli.plan_check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise UserError(f"the dry step failed with exit code {done.returncode}: {last}")
    measured = json.loads(done.stdout.splitlines()[-1])
    in_use, held = measured["in_use"], measured["held"]
    # a row for each phase, and one for the peak
    rows = [(phase, size, in_use[phase], held[phase]) for phase, size in peaks.items()]
    predicted_peak = max(peaks.values())
    measured_peak, held_peak = (max(sizes[phase] for phase in peaks) for sizes in (in_use, held))
    rows.append(("peak", predicted_peak, measured_peak, held_peak))
    lines = [f"{'MiB':<18}{'predicted':>11}{'measured':>11}{'held':>11}"]
    lines += [
        f"{name:<18}" + "".join(f"{size / MIB:>11.1f}" for size in sizes) for name, *sizes in rows
    ]
    deviation = predicted_peak / measured_peak - 1
    lines[-1] += f"   {deviation:+.1%}"
    lines.append(
        "measured: without freed memory that the allocator keeps, which is in `held`; while "
        f"loading {held['load'] / MIB:.1f} MiB, file pages that the system can take back included"
    )
    return "\n".join(lines), deviation


def _check_room(peak: int, device: torch.device) -> None:
    """Refuse to run more than the machine can hold.

    Args:
        peak: predicted bytes.
        device: of the run.
    """
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[1]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if peak > room:
        raise UserError(
            f"`--check` runs two rollouts, for which {peak / GIB:,.1f} GiB are predicted, and this "
            f"machine has {room / GIB:,.1f} GiB: leave `--check` out, or take a smaller model"
        )


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo plan`.

    Returns:
        The exit code: 1 if the measured peak differs by more than `TOLERANCE`, 2 after a mistake.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-mpo plan",
        description="Predict the peak memory of a run by part, from its configuration. Other "
        "options are those of `fit`.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--gpu-gib",
        type=float,
        metavar="GIB",
        help="also list the batch sizes that fit a GPU of this size",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also measure a rollout, its updates and a second rollout, and compare",
    )
    outcome: list[int] = []
    with without_notes():
        failed = guarded(lambda: outcome.append(_plan(*parser.parse_known_args(arguments))))
    return failed or outcome[0]


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    """Print the plan; return the exit code."""
    # options
    if not rest:
        raise UserError("`plan` needs a configuration: lightning-mpo plan -c quickstart")
    if options.gpu_gib is not None and not CONTEXT < options.gpu_gib < math.inf:
        raise UserError(
            f"`--gpu-gib` must be above {CONTEXT:g} and finite, got {options.gpu_gib:g}"
        )
    # predict
    from lightning_mpo.plan.predict import Planner
    from lightning_mpo.rollout.schedule import describe_copies

    planner = Planner(*build(rest))
    prediction = planner.predict()
    sizes = prediction.sizes
    copies = describe_copies(sizes.copies, max(1, planner.copies))
    print(
        f"{sizes.rows} sequences of {sizes.prompt} + {sizes.response} tokens, {copies}"
        f"micro-batches of {sizes.micro_rows} rows; predicted peaks by phase, above the process "
        "itself"
    )
    print(table(prediction.phases))
    print("\n".join(planner.notes()))
    if options.gpu_gib is not None:
        print(fitting(planner, options.gpu_gib))
    if not options.check:
        return 0
    # measure
    _check_room(max(prediction.peaks.values()), planner.trainer.strategy.root_device)
    comparison, deviation = check(rest, prediction.peaks)
    print(comparison)
    is_off = abs(deviation) > TOLERANCE
    if is_off:
        print(f"exit code 1: the predicted peak is off by more than {TOLERANCE:.0%}")
    return int(is_off)
