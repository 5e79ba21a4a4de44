"""A run that learns to copy digits from two habits, and the reward of each of its rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards.text import ExactAnswer
from lightning_mpo.types import PromptRow
from tests.support.runs import Run, adam, fit, make_objective

ROLLOUTS = 60


class Copies(PromptDataModule):
    """`37=` asks for `3,7;37`. Of each prompt's two solutions the other one is `7,3;73`; the target is always right."""

    def __init__(self) -> None:
        super().__init__(chat_template=False)

    def load(self) -> Splits:
        pairs = [(a, b) for a in "0123456789" for b in "0123456789" if a != b]
        rows = [
            PromptRow(f"{a}{b}=", a + b, f"{x},{y};{x}{y}")
            for a, b in pairs
            for x, y in ((a, b), (b, a))
        ]
        return Splits(rows, rows[:10])


def tiny(checkpoint: str | None = None) -> TinyPolicy:
    return TinyPolicy(
        characters="0123456789=,;", hidden_size=48, layers=2, heads=4, checkpoint=checkpoint
    )


def learn(
    folder: Path, checkpoint: str, seed: int, lr: float, rollouts: int = ROLLOUTS, **trainer: Any
) -> Run:
    return fit(
        folder,
        policy=tiny(checkpoint),
        data=Copies(),
        objective=make_objective(support=TopK(6), actions=BlockActions(FutureShare(0.2), length=3)),
        module={"optimizer": adam(lr)},
        rollout={
            "rewards": [ExactAnswer()],
            "prompts": 18,
            "completions": 8,
            "minibatches": 2,
            "max_new_tokens": 8,
            "seed": seed,
        },
        max_steps=2 * rollouts,
        gradient_clip_val=1.0,
        **trainer,
    )


def rewards(folder: Path, checkpoint: str, seed: int, lr: float, **trainer: Any) -> list[float]:
    """Return the mean reward of each rollout, over all processes."""
    run = learn(folder, checkpoint, seed, lr, **trainer)
    assert run.trainer.global_step == 2 * ROLLOUTS
    return run.record.column("reward/mean")[::2]
