"""Clip fraction against the share of future tokens, and the ε at equal clip fractions.

    python benchmarks/mpo/clip_fraction.py --frozen runs/frozen.safetensors --out runs/mpo_analyses

Each number stands beside the value of token ratios whose logarithms are multiplied by `sqrt(Σβ²)`.
Writes `clip_fraction.csv` and `clip_fraction.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import (
    Frozen,
    Row,
    at_least,
    blocks,
    panels,
    parser,
    report,
    run,
    save_picture,
    share,
    spread,
)

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import Actions, TokenActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.surrogates import ClippedRatio

LENGTHS = (2, 3, 5, 8)
SHARES = tuple(i / 10 for i in range(10))
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__ or "")
    made.add_argument(
        "--lengths", type=at_least(2), nargs="+", default=LENGTHS, help="block lengths, in tokens"
    )
    made.add_argument(
        "--shares", type=share, nargs="+", default=SHARES, help="shares of the future tokens"
    )
    made.add_argument(
        "--epsilon", type=float, default=0.2, help="clip of the token-level method, in (0, 1)"
    )
    arguments = made.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    frozen = Frozen.load(arguments.frozen)
    rows = measure(frozen, arguments.lengths, sorted(arguments.shares), arguments.epsilon)
    print(
        f"token-level: clip fraction {frozen.clip_fraction(TokenActions(), arguments.epsilon):.4g} at {arguments.epsilon}\n"
    )
    report(rows, arguments.out, "clip_fraction")
    draw(
        rows,
        arguments.epsilon,
        frozen.clip_fraction(TokenActions(), arguments.epsilon),
        arguments.out,
    )


def measure(
    frozen: Frozen, lengths: Sequence[int], shares: Sequence[float], epsilon: float
) -> list[Row]:
    """Return one row per source, block length and share; heads go as far as they reach."""
    target = frozen.clip_fraction(TokenActions(), epsilon)
    if not target:
        raise UserError(
            f"the token-level method clips nothing at {epsilon}; freeze with more --drift, or lower --epsilon"
        )
    rows: list[Row] = []
    for source in ("backbone", "mtp"):
        for length in lengths:
            if source == "backbone" or length <= frozen.offsets + 1:
                rows += [_measure(frozen, source, length, p, epsilon, target) for p in shares]
    return rows


def _measure(
    frozen: Frozen, source: str, length: int, p: float, epsilon: float, target: float
) -> Row:
    space = blocks(length, FutureShare(p), source)
    shrunk = spread(space.weights_N)
    matched = frozen.matching_clip(space, target)
    return {
        "source": source,
        "N": length,
        "share": p,
        "clip fraction": frozen.clip_fraction(space, epsilon),
        "mechanical clip fraction": shrunk_clip_fraction(frozen, shrunk, epsilon),
        "matched epsilon": matched,
        "epsilon sqrt(sum beta^2)": epsilon * shrunk,
        "clip fraction there": frozen.clip_fraction(space, matched)
        if 0 < matched < 1
        else float("nan"),
    }


def shrunk_clip_fraction(frozen: Frozen, factor: float, epsilon: float) -> float:
    """Return the clip fraction of tokens whose log-ratios are all multiplied by a factor."""
    mask_BT = frozen.mask_BT
    actions = Actions(frozen.log_ratios() * factor, frozen.advantages_BT, mask_BT, mask_BT.float())
    return float(ClippedRatio(epsilon, epsilon).clipped(actions).sum() / mask_BT.sum())


def draw(rows: Sequence[Row], epsilon: float, target: float, folder: str) -> None:
    """Plot clip fraction and matched ε over the share; a column per source."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, axes = panels(2, len(sources), width=5.6 if len(sources) > 1 else 7, share_rows=True)
    lengths = sorted({row["N"] for row in rows})
    for column, source in enumerate(sources):
        for length, colour in zip(lengths, COLOURS, strict=False):
            line = [row for row in rows if row["source"] == source and row["N"] == length]
            _plot(axes[:, column], line, f"N = {length}", colour)
        above, below = axes[:, column]
        above.axhline(target, color="tab:gray", lw=1, ls=":", label="token level")
        above.set(title=f"source: {source}", ylim=(0, None))
        below.axhline(epsilon, color="tab:gray", lw=1, ls=":", label="token level")
        below.set(xlabel="share of future tokens p", ylim=(0, None))
    axes[0, 0].set_ylabel(f"clip fraction at ε = {epsilon:g}")
    axes[1, 0].set_ylabel(f"ε with clip fraction {target:.3g}")
    axes[0, 0].plot([], [], "k--", lw=1, label="mechanical: shrunk by sqrt(Σβ²)")
    axes[0, 0].legend(fontsize=8)
    save_picture(figure, folder, "clip_fraction")


def _plot(axes: Sequence[Any], line: Sequence[Row], label: str, colour: str) -> None:
    if not line:
        return
    shares = [row["share"] for row in line]
    for one, measured, mechanical in (
        (axes[0], "clip fraction", "mechanical clip fraction"),
        (axes[1], "matched epsilon", "epsilon sqrt(sum beta^2)"),
    ):
        one.plot(shares, [row[measured] for row in line], "o-", ms=3, color=colour, label=label)
        one.plot(shares, [row[mechanical] for row in line], "--", lw=1, color=colour)


if __name__ == "__main__":
    run(main)
