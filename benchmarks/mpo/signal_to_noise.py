"""Signal-to-noise ratio of the policy gradient per granularity, on one frozen rollout.

    python benchmarks/mpo/signal_to_noise.py --frozen runs/frozen.safetensors --out runs/mpo_analyses

Gradients of the clipped surrogate are taken at the policy after the updates of freeze.py, where
clips matter: at equal ε, and at the ε that clips as much as the token-level method does. The
gradient is that of the trunk, which every setting has. With x_p the gradient of prompt p's part of
the loss, times P:

    mean = (1/P) Σ_p x_p,   noise = tr Cov(mean),   signal = |mean|² - noise,   SNR = signal / noise

Intervals are 95 %, from a jackknife over 8 blocks of prompts (Student's t). Writes
`signal_to_noise.csv` and `signal_to_noise.png`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import (
    Frozen,
    Row,
    at_least,
    blocks,
    load_policy,
    panels,
    parser,
    report,
    run,
    save_picture,
    share,
)
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.diagnostics import jackknife_error, signal_and_noise
from lightning_mpo.objective.action_spaces import ActionSpace, SequenceActions, TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.scores import Denominators, ScoreRequest, TokenScores
from lightning_mpo.types import Experience, take_rows, trim

BLOCKS = 8  # of prompts, for the jackknife
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # two-sided 95 %, for 2 … 8 blocks


@dataclass(frozen=True)
class Setting:
    """One granularity with its clip."""

    name: str
    clip: str  # "equal" or "matched"
    epsilon: float
    objective: Objective
    denominators: Denominators
    clip_fraction: float


class Sums:
    """Sums of the prompts' gradients, by block of prompts, and of their squared lengths."""

    def __init__(self, size: int, blocks: int) -> None:
        self.totals_JD = torch.zeros(blocks, size)
        self.squares = [0.0] * blocks
        self.counts = [0] * blocks

    def add(self, gradient_D: Tensor, block: int) -> None:
        """Take one prompt's gradient."""
        self.totals_JD[block] += gradient_D
        self.squares[block] += float(gradient_D.double().square().sum())
        self.counts[block] += 1

    @property
    def mean_D(self) -> Tensor:
        """Over all prompts."""
        return self.totals_JD.double().sum(0) / sum(self.counts)

    def signal_and_noise(self, without: int | None = None) -> tuple[float, float]:
        """Split the squared length of the mean, with one block of prompts left out."""
        kept = [block for block in range(len(self.counts)) if block != without]
        total_D = self.totals_JD[kept].double().sum(0)
        return signal_and_noise(
            float(total_D.square().sum()),
            sum(self.squares[b] for b in kept),
            sum(self.counts[b] for b in kept),
        )

    def ratios(self) -> tuple[float, list[float]]:
        """Return the SNR of all prompts, and those without each block, scaled to as many prompts."""
        everyone = sum(self.counts)
        parts = []
        for block, count in enumerate(self.counts):
            parts.append(_ratio(*self.signal_and_noise(block)) * everyone / (everyone - count))
        return _ratio(*self.signal_and_noise()), parts


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    frozen = Frozen.load(arguments.frozen)
    policy = load_policy(arguments.checkpoint or Path(arguments.frozen).with_suffix(".ckpt"))
    frozen = Frozen.load(arguments.frozen, policy.tokenizer)
    policy.check(ScoreRequest(future=frozen.offsets))
    settings = make_settings(frozen, arguments.lengths, arguments.shares, arguments.epsilon)
    prompts = len(frozen.rollout.group_B.unique())
    print(f"{prompts} prompts x {len(settings)} settings", file=sys.stderr)
    rows = table(settings, gradients(policy, frozen, settings))
    report(rows, arguments.out, "signal_to_noise")
    draw(rows, arguments.epsilon, arguments.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument(
        "--checkpoint",
        default=None,
        help="policy after the updates; the .ckpt beside --frozen by default",
    )
    made.add_argument(
        "--lengths", type=at_least(2), nargs="+", default=[2, 3, 5], help="block lengths, in tokens"
    )
    made.add_argument(
        "--shares", type=share, nargs="+", default=[0.2, 0.4], help="shares of the future tokens"
    )
    made.add_argument(
        "--epsilon", type=float, default=0.2, help="clip of the token-level method, in (0, 1)"
    )
    return made.parse_args(argv)


# --- settings -----------------------------------------------------------------------------------------------------


def spaces(lengths: Sequence[int], shares: Sequence[float], offsets: int) -> dict[str, ActionSpace]:
    """Return the granularities by name: tokens first, heads as far as they reach, sequences last."""
    found: dict[str, ActionSpace] = {"token": TokenActions()}
    for source in ("backbone", "mtp"):
        for length in lengths:
            if source == "backbone" or length <= offsets + 1:
                found |= {
                    f"{source}, N={length}, {p:.0%}": blocks(length, FutureShare(p), source)
                    for p in shares
                }
    return found | {"sequence": SequenceActions()}


def make_settings(
    frozen: Frozen, lengths: Sequence[int], shares: Sequence[float], epsilon: float
) -> list[Setting]:
    """Return every granularity at equal ε and, where there is one, at the ε that clips like the token level."""
    target = frozen.clip_fraction(TokenActions(), epsilon)
    whole = experience_of(frozen)
    settings = []
    for name, space in spaces(lengths, shares, frozen.offsets).items():
        matched = epsilon if name == "token" else frozen.matching_clip(space, target)
        for clip, value in (("equal", epsilon), ("matched", matched)):
            if clip == "equal" or (target and name != "token" and 0 < value < 1):
                objective = Objective(
                    FullVocabulary(),
                    space,
                    GroupRelative(),
                    ClippedRatio(value, value),
                    AllTokens(),
                    TokenMean(),
                )
                clipped = frozen.clip_fraction(space, value)
                settings.append(
                    Setting(name, clip, value, objective, objective.denominators(whole), clipped)
                )
    return settings


def experience_of(frozen: Frozen) -> Experience:
    """Return the frozen rollout as the objective wants it."""
    valid_B = torch.ones(len(frozen.mask_BT), dtype=torch.bool)
    return Experience(
        rollout=frozen.rollout,
        rewards_B=torch.zeros(len(valid_B)),
        valid_B=valid_B,
        advantages_BT=frozen.advantages_BT,
        token_weights_BT=frozen.mask_BT.float(),
        old_logprobs_BT=frozen.old_logprobs_BT,
        old_future_BTM=frozen.old_future_BTM,
    )


# --- gradients ----------------------------------------------------------------------------------------------------


def gradients(policy: TinyPolicy, frozen: Frozen, settings: Sequence[Setting]) -> list[Sums]:
    """Sum the trunk's gradients of each setting, with one forward pass per prompt."""
    weights = policy.parts()["policy"]
    groups, whole = frozen.rollout.group_B.unique(), experience_of(frozen)
    if len(groups) < 4:
        raise UserError(
            f"a signal-to-noise ratio needs at least 4 prompts, the frozen rollout has {len(groups)}"
        )
    parts = min(BLOCKS, len(groups) // 2)
    sums = [Sums(sum(weight.numel() for weight in weights), parts) for _ in settings]
    request = ScoreRequest(future=max(setting.objective.actions.future for setting in settings))
    for p, group in enumerate(groups.tolist()):
        index_B = (frozen.rollout.group_B == group).nonzero()[:, 0]
        experience = trim(take_rows(whole, index_B))
        scores = policy.score(
            experience.rollout, experience.mask_BT, temperature=1.0, request=request
        )
        _check_weights(scores, frozen, index_B)
        for setting, total in zip(settings, sums, strict=True):
            loss = prompt_loss(setting, experience, scores)
            parts_of = torch.autograd.grad(
                loss * len(groups), weights, retain_graph=True, allow_unused=True
            )
            flat = [
                (torch.zeros_like(w) if g is None else g).flatten()
                for g, w in zip(parts_of, weights, strict=True)
            ]
            total.add(torch.cat(flat), p % parts)
    return sums


def prompt_loss(setting: Setting, experience: Experience, scores: TokenScores) -> Tensor:
    """Return one prompt's part of the whole rollout's surrogate."""
    future = setting.objective.actions.future
    ahead_BTM, old_BTM = scores.future_BTM, experience.old_future_BTM
    kept = replace(
        scores, future_BTM=ahead_BTM[..., :future] if future and ahead_BTM is not None else None
    )
    past = replace(
        experience, old_future_BTM=old_BTM[..., :future] if future and old_BTM is not None else None
    )
    return setting.objective.loss(past, kept, setting.denominators)[0]


def _check_weights(scores: TokenScores, frozen: Frozen, index_B: Tensor) -> None:
    """Refuse a policy that is not the one whose log-probs were frozen."""
    T = scores.logprobs_BT.shape[1]
    off = float((scores.logprobs_BT.detach() - frozen.logprobs_BT[index_B, :T]).abs().max())
    if off > 1e-2:
        raise UserError(
            f"the checkpoint is not the policy of the frozen rollout: log-probs differ by {off:.3g} nats"
        )


# --- results ------------------------------------------------------------------------------------------------------


def table(settings: Sequence[Setting], sums: Sequence[Sums]) -> list[Row]:
    """Return one row per setting; the first one is the token level, which the others are compared with."""
    token_D, (token, token_without) = sums[0].mean_D, sums[0].ratios()
    rows: list[Row] = []
    for setting, total in zip(settings, sums, strict=True):
        value, without = total.ratios()
        low, high = interval_of_ratio(value, without, token, token_without)
        rows.append(
            {
                "granularity": setting.name,
                "clip": setting.clip,
                "epsilon": setting.epsilon,
                "clip fraction": setting.clip_fraction,
                "SNR": value,
                "SNR ±": half_width(without),
                "SNR / token": value / token,
                "SNR / token low": low,
                "SNR / token high": high,
                "cosine with token": float(
                    torch.nn.functional.cosine_similarity(total.mean_D, token_D, dim=0)
                ),
                "|mean| / |token|": float(total.mean_D.norm() / token_D.norm()),
            }
        )
    return rows


def half_width(without: Sequence[float]) -> float:
    """Return half a 95 % interval from estimates without each block in turn."""
    return STUDENT[len(without) - 2] * jackknife_error(without)


def interval_of_ratio(
    value: float, without: Sequence[float], other: float, other_without: Sequence[float]
) -> tuple[float, float]:
    """Return a 95 % interval of value / other, from the jackknife of its logarithm; NaN where one is not positive."""
    if min(value, other, *without, *other_without) <= 0:
        return math.nan, math.nan
    off = half_width(
        [math.log(mine / its) for mine, its in zip(without, other_without, strict=True)]
    )
    return value / other * math.exp(-off), value / other * math.exp(off)


def _ratio(signal: float, noise: float) -> float:
    return signal / noise if noise else math.nan


def draw(rows: Sequence[Row], epsilon: float, folder: str) -> None:
    """Plot SNR, its ratio to the token level's, and the cosine; a line per granularity."""
    names = list(dict.fromkeys(row["granularity"] for row in rows))
    figure, axes = panels(1, 3, width=4.0, height=1.4 + 0.28 * len(names))
    for clip, colour, shift in (("equal", "tab:blue", -0.13), ("matched", "tab:orange", 0.13)):
        line = [row for row in rows if row["clip"] == clip]
        y = [names.index(row["granularity"]) + shift for row in line]
        label = f"equal ε = {epsilon:g}" if clip == "equal" else "matched clip fraction"
        style = {"fmt": "o", "ms": 4, "capsize": 3, "color": colour, "label": label}
        axes[0, 0].errorbar(
            [row["SNR"] for row in line], y, xerr=[row["SNR ±"] for row in line], **style
        )
        gains = [row["SNR / token"] for row in line]
        off = [[row["SNR / token"] - row["SNR / token low"] for row in line]]
        off += [[row["SNR / token high"] - row["SNR / token"] for row in line]]
        axes[0, 1].errorbar(gains, y, xerr=off, **style)
        axes[0, 2].plot([row["cosine with token"] for row in line], y, "o", ms=4, color=colour)
    labels = (
        "signal / noise of the mean gradient",
        "the same, relative to token",
        "cosine with the token's gradient",
    )
    for one, label in zip(axes[0], labels, strict=True):
        one.set(
            xlabel=label, yticks=range(len(names)), yticklabels=[], ylim=(len(names) - 0.5, -0.5)
        )
    axes[0, 0].set_yticklabels(names)
    axes[0, 1].set_xscale("log")
    axes[0, 1].axvline(1, color="tab:gray", lw=1, ls=":")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2
    )
    save_picture(figure, folder, "signal_to_noise")


if __name__ == "__main__":
    run(main)
