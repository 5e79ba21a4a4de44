"""Draws the memory of a run: the peak of each phase by part, and the weights of policy and reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_mpo.memory.footprint import Footprint

MIB = 2**20


def parts_of(
    peaks: dict[str, int],
    allocator_free: dict[str, int],
    baseline: int,
    weights: Footprint,
    held: dict[str, int],
) -> dict[str, list[int]]:
    """Split the peak of each phase into known parts and the rest, in bytes.

    Args:
        peaks: bytes in use, by phase.
        allocator_free: freed bytes that the allocator holds beside them, by phase.
        baseline: of the process before loading.
        weights: of the policy.
        held: gradients and optimiser state.
    """
    grads = [held["gradients"] if phase in ("backward", "optimiser") else 0 for phase in peaks]
    state = [held["optimiser"] if phase != "load" else 0 for phase in peaks]
    parts = {
        "process before loading": [baseline] * len(peaks),
        "base": [weights.base] * len(peaks),
        "reference copy": [weights.reference] * len(peaks),
        "adapters, heads": [weights.adapters + weights.parts] * len(peaks),
        "optimiser state": state,
        "gradients": grads,
    }
    known = [sum(column) for column in zip(*parts.values(), strict=True)]
    parts["activations, caches, buffers"] = [
        max(0, peak - size) for peak, size in zip(peaks.values(), known, strict=True)
    ]
    parts["kept by the allocator"] = list(allocator_free.values())
    return {name: sizes for name, sizes in parts.items() if any(sizes)}


def draw_memory(
    peaks: dict[str, int],
    allocator_free: dict[str, int],
    baseline: int,
    weights: Footprint,
    held: dict[str, int],
    path: Path,
) -> None:
    """Plot the peak of each phase by part, and the weights beside those of other set-ups.

    Args:
        peaks: bytes in use, by phase.
        allocator_free: freed bytes that the allocator holds beside them, by phase.
        baseline: of the process before loading.
        weights: of the policy.
        held: gradients and optimiser state.
        path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(11, 4.5),
        layout="constrained",
        width_ratios=(3, 2),
        gridspec_kw={"wspace": 0.05},
    )
    _draw_phases(left, peaks, parts_of(peaks, allocator_free, baseline, weights, held))
    _draw_weights(right, weights)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_phases(axes: Any, peaks: dict[str, int], parts: dict[str, list[int]]) -> None:
    """Stack the parts of each phase's peak; memory that only the allocator holds is hatched."""
    foot = [0.0] * len(peaks)
    for name, sizes in parts.items():
        heights = [size / MIB for size in sizes]
        hatched = {"color": "none", "edgecolor": "tab:gray", "hatch": "//"}
        look = hatched if name.startswith("kept") else {}
        axes.bar(list(peaks), heights, bottom=foot, label=name, **look)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    # bytes in use above each stack
    for index, (size, top) in enumerate(zip(peaks.values(), foot, strict=True)):
        label = f"{size / MIB:.0f} in use"
        axes.annotate(label, (index, top), ha="center", va="bottom", fontsize=8)
    axes.set(ylabel="MiB", title="peak of each phase")
    axes.margins(y=0.12)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _draw_weights(axes: Any, weights: Footprint) -> None:
    """Stack the weights of this run beside those of a second copy and of two bf16 models."""
    bars = {
        "bf16 policy\n+ bf16 copy": (2 * weights.numbers, 0, 2 * weights.numbers),
        "this policy\n+ a copy": (weights.base, weights.adapters, weights.base),
        "this run": (weights.base, weights.adapters, weights.reference),
    }
    foot = [0.0] * len(bars)
    for index, name in enumerate(("base", "adapters", "reference")):
        heights = [sizes[index] / MIB for sizes in bars.values()]
        axes.bar(list(bars), heights, bottom=foot, label=name)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    # size, and its ratio to two bf16 models, above each stack
    for index, total in enumerate(foot):
        label = f"{total:.0f} ({total / foot[0]:.2f}x)"
        axes.annotate(label, (index, total), ha="center", va="bottom", fontsize=8)
    axes.set(ylabel="MiB", title="weights of policy and reference")
    axes.margins(y=0.12)
    axes.legend(fontsize=7)
