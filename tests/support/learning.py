"""A run that learns to copy digits from two habits, and the reward of each of its rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards.text import ExactAnswer
from lightning_mpo.types import PromptRow
from tests.support.runs import Run, adam, fit, make_objective

MOST = 200
"""Rollouts after which a run that has not learnt fails; the slowest of 26 runs needed 30."""
GAIN = 0.25
"""Of the mean reward, at which a run ends: a half and more is to be gained."""


def gain(curve: list[float]) -> float:
    """Return the mean of the last four rollouts less that of the first two."""
    return sum(curve[-4:]) / 4 - sum(curve[:2]) / 2


class StopAtGain(L.Callback):
    """Ends a run once its reward has risen by `GAIN`; all processes see the same rewards."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx % 2 == 0:  # the first of the two updates on a rollout
            self.curve.append(float(trainer.callback_metrics["reward/mean"]))
            trainer.should_stop = len(self.curve) >= 6 and gain(self.curve) > GAIN


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
    folder: Path, checkpoint: str, seed: int, lr: float, rollouts: int = MOST, **trainer: Any
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
    """Return the mean reward of each rollout, over all processes, until it has risen."""
    stop = StopAtGain()
    learn(folder, checkpoint, seed, lr, callbacks=[stop], **trainer)
    return stop.curve
