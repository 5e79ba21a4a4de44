"""Spread of joint against weighted ratios, over block length and weights, on one frozen rollout.

    python benchmarks/mpo/ratio_variance.py --frozen runs/frozen.safetensors --out runs/mpo_analyses

Every setting is measured at the same positions: those with a whole block of the longest length.
Writes `ratio_variance.csv` and `ratio_variance.png`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Frozen, Row, at_least, blocks, panels, parser, report, run, save_picture, spread
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.functional.diagnostics import effective_sample_size, weight_moments
from lightning_mpo.objective.block_weights import BlockWeights, FutureShare, GeometricDecay

WEIGHTS: dict[str, Callable[[], BlockWeights] | None] = {
    "joint": None,
    "share 10 %": lambda: FutureShare(0.1),
    "share 20 %": lambda: FutureShare(0.2),
    "share 30 %": lambda: FutureShare(0.3),
    "share 40 %": lambda: FutureShare(0.4),
    "geometric 0.5": lambda: GeometricDecay(0.5),
    "uniform": lambda: GeometricDecay(1.0),
}
COLOURS = ("tab:red", "#c6dbef", "#9ecae1", "#4292c6", "#08519c", "tab:green", "tab:orange")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__ or "")
    made.add_argument("--longest", type=at_least(2), default=8, help="longest block, in tokens")
    arguments = made.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    frozen = Frozen.load(arguments.frozen)
    rows = measure(frozen, arguments.longest)
    report(rows, arguments.out, "ratio_variance")
    draw(rows, arguments.out)


def measure(frozen: Frozen, longest: int) -> list[Row]:
    """Return one row per source, weights and block length; heads go as far as they reach."""
    whole_BT = window(frozen.mask_BT, longest - 1)
    if int(whole_BT.sum()) < 2:
        raise UserError(f"no response of the frozen rollout has {longest} tokens; lower --longest")
    rows: list[Row] = []
    for source, reach in (("backbone", longest), ("mtp", min(longest, frozen.offsets + 1))):
        if reach > 1:
            lengths = range(1, reach + 1)
            rows += [
                _measure(frozen, source, name, length, whole_BT)
                for name in WEIGHTS
                for length in lengths
            ]
    return rows


def _measure(frozen: Frozen, source: str, name: str, length: int, whole_BT: Tensor) -> Row:
    make = WEIGHTS[name]
    space = blocks(length, make and make(), source, joint=make is None)
    log_ratios_n = frozen.actions(space).log_ratios_BU[whole_BT].double()
    columns_Nn = torch.stack(
        [column[whole_BT] for column in offsets(frozen, source, length)]
    ).double()
    errors_N = columns_Nn.std(1).tolist()
    ratios_n = log_ratios_n.exp()
    return {
        "source": source,
        "weights": name,
        "N": length,
        "std log R": float(log_ratios_n.std()),
        "s sqrt(sum beta^2)": errors_N[0] * spread(space.weights_N),
        "sqrt(sum beta^2 s_n^2)": math.hypot(
            *(b * s for b, s in zip(space.weights_N, errors_N, strict=True))
        ),
        "mean R": float(ratios_n.mean()),
        "var R": float(ratios_n.var()),
        "effective samples": float(
            effective_sample_size(weight_moments(log_ratios_n, torch.ones_like(log_ratios_n) > 0))
        ),
    }


def offsets(frozen: Frozen, source: str, length: int) -> list[Tensor]:
    """Return the log-ratio of each offset of a block, in the place of its first token. Each `[B, T]`."""
    if source == "mtp" and length > 1:
        return list(frozen.log_ratios(length - 1).unbind(-1))
    return [shift_left(frozen.log_ratios(), n) for n in range(length)]


def draw(rows: Sequence[Row], folder: str) -> None:
    """Plot the spread of log R, beside its prediction, and the variance of R."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, axes = panels(2, len(sources), width=5.6 if len(sources) > 1 else 7, share_rows=True)
    for column, source in enumerate(sources):
        for name, colour in zip(WEIGHTS, COLOURS, strict=True):
            line = [row for row in rows if row["source"] == source and row["weights"] == name]
            _plot(axes[:, column], line, name, colour)
        axes[0, column].set(title=f"source: {source}", ylim=(0, None))
        axes[1, column].set(xlabel="block length N, tokens", yscale="log")
        for one in axes[:, column]:
            one.set_xticks(sorted({row["N"] for row in rows if row["source"] == source}))
    axes[0, 0].set_ylabel("std of log R, nats")
    axes[1, 0].set_ylabel("variance of R")
    axes[0, 0].plot([], [], "k--", lw=1, label="s·sqrt(Σβ²): independent offsets")
    axes[0, 0].legend(fontsize=8)
    save_picture(figure, folder, "ratio_variance")


def _plot(axes: Sequence[Any], line: Sequence[Row], name: str, colour: str) -> None:
    lengths = [row["N"] for row in line]
    axes[0].plot(lengths, [row["std log R"] for row in line], "o-", ms=3, color=colour, label=name)
    axes[0].plot(lengths, [row["s sqrt(sum beta^2)"] for row in line], "--", lw=1, color=colour)
    axes[1].plot(lengths, [row["var R"] for row in line], "o-", ms=3, color=colour, label=name)


if __name__ == "__main__":
    run(main)
