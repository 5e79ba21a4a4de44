"""Freezes a rollout of the quickstart, with its log-probs before and after a few updates on it.

    python benchmarks/mpo/freeze.py --checkpoint runs/quickstart_mtp/warmup-seed0/last.ckpt --out runs/frozen.safetensors

The policy samples training problems, is rewarded for right sums, and takes a few token-level GRPO
updates on the rollout. Ratios after them are those of an off-policy step. Heads get no gradient, so
their predictions change with the trunk alone. Writes the rollout, whose content
docs/mpo_analyses.md lists, and the policy after the updates as `.ckpt`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import Frozen, add_threads, at_least, load_policy, offsets_of, run, sample
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.rewards import ExactAnswer
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rollout import save_rollout
from lightning_mpo.scores import ScoreRequest, TokenScores, join_scores
from lightning_mpo.types import Experience, Rollout, take_rows, trim

ROWS = 128  # scored together


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.checkpoint)
    offsets = offsets_of(policy) if arguments.offsets is None else arguments.offsets
    request = ScoreRequest(future=offsets)
    policy.check(request)
    rollout = sample(
        policy,
        arguments.prompts,
        arguments.completions,
        held_out=False,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    experience = judge(rollout, arguments.completions)
    old = score(policy, rollout, request)
    experience = replace(experience, old_logprobs_BT=old.logprobs_BT)
    drift(policy, experience, arguments.drift, arguments.learning_rate)
    new = score(policy, rollout, request)
    tensors = {
        "rewards_B": experience.rewards_B,
        "advantages_BT": experience.advantages_BT,
        "old_logprobs_BT": old.logprobs_BT,
        "logprobs_BT": new.logprobs_BT,
        "old_future_BTM": old.future_BTM,
        "future_BTM": new.future_BTM,
    }
    save_rollout(
        arguments.out,
        rollout,
        tokenizer=policy.tokenizer,
        **{name: value for name, value in tensors.items() if value is not None},
    )
    save_weights(policy, weights_beside(arguments.out))
    describe(Frozen.load(arguments.out), experience.rewards_B)
    print(f"wrote {arguments.out}\nwrote {weights_beside(arguments.out)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, help="of the quickstart's policy, with or without heads"
    )
    parser.add_argument("--out", default="runs/frozen.safetensors", help="the file")
    parser.add_argument("--prompts", type=at_least(2), default=64, help="training problems")
    parser.add_argument("--completions", type=at_least(2), default=8, help="samples of each")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=40, help="longest sample")
    parser.add_argument(
        "--offsets", type=at_least(0), default=None, help="M, offsets of the heads; all by default"
    )
    parser.add_argument("--drift", type=at_least(0), default=4, help="updates on the whole rollout")
    parser.add_argument(
        "--learning-rate", type=at_least(0.0, float), default=1e-4, help="of AdamW in these updates"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of prompts and samples")
    add_threads(parser)
    return parser.parse_args(argv)


def judge(rollout: Rollout, completions: int) -> Experience:
    """Reward right sums; an advantage compares the completions of a prompt."""
    scores, mask_BT = score_all([ExactAnswer()], completions_of(rollout)), rollout.response_mask_BT
    rewards_BT = at_last_token(scores.rewards_B, mask_BT)
    advantages_BT = (
        GroupRelative()
        .estimate(Outcome(rewards_BT, mask_BT, completions, scores.valid_B))
        .advantages_BT
    )
    if not advantages_BT.any():
        raise UserError(
            "all completions of every prompt have the same reward: there is no advantage to learn from"
        )
    return Experience(rollout, scores.rewards_B, scores.valid_B, advantages_BT, mask_BT.float())


def score(policy: TinyPolicy, rollout: Rollout, request: ScoreRequest) -> TokenScores:
    """Score a rollout without gradient."""
    with rollout_mode(policy):
        rows = torch.arange(len(rollout.group_B)).split(ROWS)
        parts = [take_rows(rollout, index_B) for index_B in rows]
        return join_scores(
            [
                policy.score(part, part.response_mask_BT, temperature=1.0, request=request)
                for part in parts
            ]
        )


def drift(policy: TinyPolicy, experience: Experience, updates: int, learning_rate: float) -> None:
    """Take token-level GRPO updates on all rows; heads stay as they are."""
    objective = Objective(
        FullVocabulary(), TokenActions(), GroupRelative(), ClippedRatio(), AllTokens(), TokenMean()
    )
    policy.freeze_unused(objective.request)
    weights: list[Tensor] = policy.parts()["policy"]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    denominators = objective.denominators(experience)
    for _ in range(updates):
        optimizer.zero_grad()
        for rows in torch.arange(len(experience.rewards_B)).split(ROWS):
            part = trim(take_rows(experience, rows))
            scores = policy.score(
                part.rollout, part.mask_BT, temperature=1.0, request=objective.request
            )
            objective.loss(part, scores, denominators)[0].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def weights_beside(path: str | Path) -> Path:
    """Return where the policy after the updates stands."""
    return Path(path).with_suffix(".ckpt")


def save_weights(policy: TinyPolicy, path: Path) -> None:
    """Write the policy as `policy.checkpoint` takes it."""
    state = {
        f"policy.{name}": value for name, value in policy.trained_state(policy.state_dict()).items()
    }
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    torch.save({"state_dict": state, "mtp": policy.describe_heads()}, unfinished)
    os.replace(unfinished, path)


def describe(frozen: Frozen, rewards_B: Tensor) -> None:
    """Print what was frozen."""
    mask_BT = frozen.mask_BT
    ratios = frozen.log_ratios()[mask_BT]
    squares = ratios.square().sort(descending=True).values
    few = squares[: max(1, len(squares) // 100)].sum() / squares.sum().clamp(min=1e-30)
    print(
        f"{len(rewards_B)} responses, {len(ratios)} tokens, mean reward {float(rewards_B.mean()):.3f}"
    )
    print(
        f"token log-ratios: std {float(ratios.std()):.4f} nats, largest {float(ratios.abs().max()):.3f}, "
        f"{float(few):.0%} of their squares in 1 % of the tokens; "
        f"clip fraction at 0.2: {frozen.clip_fraction(TokenActions(), 0.2):.4f}"
    )
    for n in range(1, frozen.offsets + 1):
        ahead = frozen.log_ratios(n)[..., n]
        print(f"heads, offset {n}: std {float(ahead[window(mask_BT, n)].std()):.4f} nats")


if __name__ == "__main__":
    run(main)
