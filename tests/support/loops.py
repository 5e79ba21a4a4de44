"""A callback that records each slot, and a reward with an accuracy."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback

from tests.support.runs import Digits


class Slots(Callback):
    """Writes down what each slot was given."""

    def __init__(self) -> None:
        self.rows, self.steps, self.flags, self.weights = [], [], [], []
        self.first_ratio, self.counters = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        source = module.source
        batch_rows = batch["micro_batch"].rollout
        self.rows.append(batch_rows)
        self.flags.append((batch["first_update"], batch["last_of_update"]))
        self.steps.append(trainer.global_step)
        self.counters.append(source.counter)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(
            torch.cat([weight.detach().flatten() for weight in module.policy.parameters()])
        )


class Right(Digits):
    """Says what is right: `val/pass_at_1` needs a reward that does."""

    is_accuracy = True
