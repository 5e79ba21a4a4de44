"""The LightningModule of the supervised stage before reinforcement learning."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.modules.parallel import build_policy, check_strategy
from lightning_mpo.modules.saved_state import keep_trained, mend_epoch_end
from lightning_mpo.modules.stage import Stage
from lightning_mpo.modules.trainer import prompts_of
from lightning_mpo.modules.trainer_options import check_trainer
from lightning_mpo.modules.trial import has_vectors, make_optimizer, try_optimizer
from lightning_mpo.policies.base import Policy
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import PromptRow, to_device


class SupervisedWarmup(Stage):
    """Trains a policy to imitate solutions: minimises `-mean log pi` of solution tokens.

    The reinforcement stage takes its checkpoint as `policy.checkpoint`.

    Args:
        policy: what is trained.
        batch_size: rows of a micro-batch.
        batches_per_epoch: micro-batches between two epoch ends; prompts go on where they stopped.
        optimizer: of the trained weights.
        scheduler: of the learning rate, stepped per update; None: constant.
    """

    def __init__(
        self,
        policy: Policy,
        batch_size: int = 32,
        batches_per_epoch: int = 100,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        at_least("SupervisedWarmup", 1, batch_size=batch_size, batches_per_epoch=batches_per_epoch)
        self.policy = policy
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.strict_loading = False

    @property
    def data(self) -> PromptDataModule:
        """The data module, which must serve solutions."""
        return prompts_of(self.trainer)

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        check_trainer(self.trainer)
        if stage == "fit":
            try_optimizer(
                self.optimizer,
                self.scheduler,
                vectors=has_vectors(self.policy),
                updates=self.trainer.max_steps,
            )
        self.policy.check()
        self.data.connect(self.policy.tokenizer, self.policy.end_tokens)
        self.data.check_solutions(self.policy.positions)

    def configure_model(self) -> None:
        build_policy(
            self,
            self.policy,
            reference=False,
            freeze=lambda: self.policy.freeze_unused(ScoreRequest()),
        )

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optimizer, [weight for weight in self.policy.parameters() if weight.requires_grad]
        )
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def train_dataloader(self) -> SlotLoader:
        return SlotLoader(self.batches_per_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        position = self.trainer.fit_loop.epoch_loop.total_batch_idx
        rows = self.data.training_rows(position, self.batch_size * world)
        loss = self._loss(rows[rank * self.batch_size : (rank + 1) * self.batch_size])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(
            "val/loss", self._loss(batch.rows), prog_bar=True, batch_size=len(batch), sync_dist=True
        )

    def _loss(self, rows: list[PromptRow]) -> Tensor:
        solutions = to_device(self.data.solutions(rows), self.device)
        mask_BT = solutions.response_mask_BT
        scores = self.policy.score(solutions, mask_BT, temperature=1.0)
        return -scores.logprobs_BT.sum() / mask_BT.sum()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(checkpoint, self.policy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_epoch_end(checkpoint)
