"""The LightningModule of the supervised stage before reinforcement learning."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.curriculum import check_imitation
from lightning_mpo.modules.fitting import check_length
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.modules.masked_tokens import (
    MaskedTokens,
    check_demonstrations,
    check_likelihood,
)
from lightning_mpo.modules.parallel import build_policy, check_strategy
from lightning_mpo.modules.saved_state import keep_trained, mend_epoch_end
from lightning_mpo.modules.stage import Stage
from lightning_mpo.modules.trainer import prompts_of
from lightning_mpo.modules.trainer_options import check_trainer
from lightning_mpo.modules.trial import has_vectors, make_optimizer, try_optimizer
from lightning_mpo.policies.base import Policy
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow, to_device


class SupervisedWarmup(Stage):
    """Trains a policy to imitate solutions: minimises `-mean log pi` of solution tokens.

    A masked policy learns to fill in the tokens that `likelihood` hides. The reinforcement stage
    takes the checkpoint of this stage as `policy.checkpoint`.

    Args:
        policy: what is trained.
        batch_size: rows of a micro-batch.
        batches_per_epoch: micro-batches between two epoch ends; prompts go on where they stopped.
        optimizer: of the trained weights.
        scheduler: of the learning rate, stepped per update; None: constant.
        likelihood: which tokens of solutions a masked policy must fill in. None: the policy is
            causal and learns token by token.
    """

    def __init__(
        self,
        policy: Policy,
        batch_size: int = 32,
        batches_per_epoch: int = 100,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        scheduler: LRSchedulerCallable | None = None,
        likelihood: MaskedTokens | None = None,
    ) -> None:
        super().__init__()
        at_least("SupervisedWarmup", 1, batch_size=batch_size, batches_per_epoch=batches_per_epoch)
        self.policy = policy
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.likelihood = likelihood
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
        check_likelihood(self.policy, self.likelihood)
        self.policy.check()
        check_imitation(self.data.curriculum, "SupervisedWarmup")
        self.data.connect(self.policy.tokenizer, self.policy.end_tokens)
        if self.likelihood is not None:
            check_length(
                *(self.policy.positions, self.data.longest_prompt),
                *(self.likelihood.canvas, "likelihood.canvas"),
            )
            rows = [*self.data.splits.train, *self.data.validation_rows]
            check_demonstrations(self.policy, rows)
        self.data.check_solutions(self.policy.positions, self._canvas)

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
        count = self.batch_size * world
        mine = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        rows, numbers_BX = self.data.training_rows(position, count), None
        if self.likelihood is not None:  # the same numbers for any number of processes
            generator = generator_of(self.data.seed, Stream.DEMONSTRATE, position)
            numbers_BX = self.likelihood.numbers(count, generator)[mine]
        loss = self._loss(rows[mine], numbers_BX)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows, numbers_BX = list(batch.rows), None
        if self.likelihood is not None:  # the same numbers in each validation
            position = batch_idx, self.trainer.global_rank
            generator = generator_of(self.data.seed, Stream.DEMONSTRATE_HELD_OUT, *position)
            numbers_BX = self.likelihood.numbers(len(rows), generator)
        logprobs_BT, mask_BT = self._logprobs(rows, numbers_BX)
        loss = -logprobs_BT.sum() / mask_BT.sum()
        self.log("val/loss", loss, prog_bar=True, batch_size=len(rows), sync_dist=True)
        # means over parts of the tokens, such as code without thoughts
        for name, part_BT in self.data.token_parts(rows).items():
            part_BT = part_BT.to(self.device)
            count = int(part_BT.sum())
            mean = -(logprobs_BT * part_BT).sum() / max(count, 1)
            self.log(f"val/{name}_nats", mean, batch_size=count, sync_dist=True)
            total = float(count)
            self.log(f"val/{name}_tokens", total, reduce_fx="sum", batch_size=1, sync_dist=True)

    @property
    def _canvas(self) -> int | None:
        return None if self.likelihood is None else self.likelihood.canvas

    def _loss(self, rows: list[PromptRow], numbers_BX: Tensor | None = None) -> Tensor:
        """Return the loss of demonstrations; `numbers_BX` choose the tokens that are hidden."""
        logprobs_BT, mask_BT = self._logprobs(rows, numbers_BX)
        return -logprobs_BT.sum() / mask_BT.sum()

    def _logprobs(
        self, rows: list[PromptRow], numbers_BX: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of the tokens of demonstrations, and their mask, each `[B, T]`."""
        solutions = self.data.solutions(rows, self._canvas)
        if self.likelihood is not None and numbers_BX is not None:
            solutions = self.likelihood.hide(solutions, numbers_BX)
        solutions = to_device(solutions, self.device)
        mask_BT = solutions.response_mask_BT
        scores = self.policy.score(solutions, mask_BT, temperature=1.0)
        return scores.logprobs_BT, mask_BT

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(checkpoint, self.policy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_epoch_end(checkpoint)
