"""Reliability of the future information: accuracy of heads on the policy's samples, per offset.

    python benchmarks/mpo/reliability.py --checkpoint runs/quickstart_mtp/warmup-seed0/last.ckpt \\
        --checkpoint runs/quickstart_mtp/checkpoints/last.ckpt --label warm-up --label trained

Each checkpoint is judged on its own samples of the same held-out problems: the share of tokens that it ranks first, and
the cross-entropy, which at offset 0 is that of the ordinary head. Intervals are 95 %, with the problem as the unit.
Writes `reliability.csv` and `reliability.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from common import (
    Row,
    at_least,
    load_policy,
    offsets_of,
    panels,
    parser,
    report,
    run,
    sample,
    save_picture,
)
from torch import Tensor

from lightning_mpo.functional.actions import window
from lightning_mpo.functional.diagnostics import clustered_mean
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import Rollout

Z = 1.96  # of a two-sided 95 % interval


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for checkpoint, label in zip(arguments.checkpoint, arguments.label, strict=True):
        policy = load_policy(checkpoint)
        rollout = sample(
            policy,
            arguments.prompts,
            arguments.completions,
            held_out=True,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
        )
        rows += measure(policy, rollout, label)
    report(rows, arguments.out, "reliability")
    draw(rows, arguments.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "", frozen=False)
    made.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        help="of the quickstart's policy; may be repeated",
    )
    made.add_argument(
        "--label",
        action="append",
        default=None,
        help="name of each checkpoint; its path by default",
    )
    made.add_argument("--prompts", type=at_least(2), default=200, help="held-out problems")
    made.add_argument("--completions", type=at_least(1), default=4, help="samples of each")
    made.add_argument("--max-new-tokens", type=at_least(1), default=40, help="longest sample")
    made.add_argument("--seed", type=at_least(0), default=0, help="of the samples")
    arguments = made.parse_args(argv)
    arguments.label = arguments.label or arguments.checkpoint
    if len(arguments.label) != len(arguments.checkpoint) or len(set(arguments.label)) != len(
        arguments.label
    ):
        made.error("--label must name each checkpoint once, and no two alike")
    return arguments


def measure(policy: TinyPolicy, rollout: Rollout, label: str) -> list[Row]:
    """Return one row per offset, with intervals over prompts."""
    M, mask_BT = offsets_of(policy), rollout.response_mask_BT
    ranks_BTN = policy.ranks(rollout, mask_BT, M)
    with rollout_mode(policy):
        scores = policy.score(rollout, mask_BT, temperature=1.0, request=ScoreRequest(future=M))
    logprobs_BTN = scores.logprobs_BT[..., None]
    if scores.future_BTM is not None:
        logprobs_BTN = torch.cat([logprobs_BTN, scores.future_BTM], -1)
    heads = policy.describe_heads()
    rows: list[Row] = []
    for n in range(M + 1):
        alive_BT = window(mask_BT, n)
        accuracy, off = clustered_mean(
            *by_prompt(ranks_BTN[..., n] == 0, alive_BT, rollout.group_B)
        )
        error, spread = clustered_mean(*by_prompt(-logprobs_BTN[..., n], alive_BT, rollout.group_B))
        rows.append(
            {
                "checkpoint": label,
                "family": "none" if heads is None else heads["family"],
                "offset": n,
                "accuracy": accuracy,
                "accuracy low": max(accuracy - Z * off, 0.0),
                "accuracy high": min(accuracy + Z * off, 1.0),
                "cross-entropy": error,
                "cross-entropy low": max(error - Z * spread, 0.0),
                "cross-entropy high": error + Z * spread,
                "tokens": int(alive_BT.sum()),
            }
        )
    return rows


def by_prompt(values_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the tokens of each prompt add up to, and how many they are. Shapes `[P]`."""
    P = int(group_B.max()) + 1
    totals_B, counts_B = (
        torch.where(mask_BT, values_BT.double(), 0.0).sum(1),
        mask_BT.sum(1).double(),
    )
    empty_P = torch.zeros(P, dtype=torch.float64)
    return empty_P.index_add(0, group_B, totals_B), empty_P.index_add(0, group_B, counts_B)


def draw(rows: Sequence[Row], folder: str) -> None:
    """Plot accuracy and cross-entropy over the offset, a line per checkpoint."""
    figure, axes = panels(1, 2, width=4.6)
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))
    for index, label in enumerate(labels):
        line = [row for row in rows if row["checkpoint"] == label]
        x = [row["offset"] + 0.06 * (index - (len(labels) - 1) / 2) for row in line]
        for one, name in zip(axes[0], ("accuracy", "cross-entropy"), strict=True):
            values = [row[name] for row in line]
            off = [
                [row[name] - row[f"{name} low"] for row in line],
                [row[f"{name} high"] - row[name] for row in line],
            ]
            one.errorbar(
                x,
                values,
                yerr=off,
                fmt="o-",
                ms=4,
                capsize=3,
                label=f"{label} ({line[0]['family']})",
            )
    axes[0, 0].set(ylabel="share ranked first", ylim=(0, 1.02))
    axes[0, 1].set(ylabel="cross-entropy, nats", ylim=(0, None))
    for one in axes[0]:
        one.set(
            xlabel="offset n (0: the ordinary head)", xticks=sorted({row["offset"] for row in rows})
        )
    axes[0, 0].legend(fontsize=8, loc="lower left")
    save_picture(figure, folder, "reliability")


if __name__ == "__main__":
    run(main)
