"""The LightningModule that warms multi-token-prediction heads up before reinforcement learning."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mpo.checks import at_least, seeds, temperatures
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.curriculum import check_imitation
from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.modules.fitting import check_fit
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.modules.parallel import build_policy, check_strategy
from lightning_mpo.modules.saved_state import keep_trained, mend_epoch_end
from lightning_mpo.modules.stage import Stage
from lightning_mpo.modules.trainer import prompts_of
from lightning_mpo.modules.trainer_options import check_trainer
from lightning_mpo.modules.trial import make_optimizer, try_optimizer
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptBatch, PromptRow, Rollout, take_rows, to_device, trim_rollout


@dataclass(frozen=True)
class SamplePool:
    """Samples that are drawn at once and then learnt from in several micro-batches.

    Args:
        prompts: prompts of a pool, over all processes.
        completions: samples per prompt.
        max_new_tokens: longest sample.
        passes: micro-batches into which a pool is cut; then the next is drawn.
    """

    prompts: int = 32
    completions: int = 4
    max_new_tokens: int = 128
    passes: int = 4

    def __post_init__(self) -> None:
        at_least("SamplePool", 1, **vars(self))


class HeadWarmup(Stage):
    """Trains the heads of a policy whose trunk stays as it is, bit for bit.

        L = (1/M) Σ_n mean_t -log q_n(o_{t+n} | h_t)        (the MTP loss [S]; docs/algorithms.md
        11.2)

    The mean is over the tokens that have a target at offset n. The paper is silent on data, steps
    and learning rate [N]. By default the tokens are the policy's own samples: theirs is the
    distribution whose ratios will be needed [I]. Logged per offset: cross-entropy in nats, and on
    validation the share of tokens that the head ranks first (offset 0: the ordinary head).
    `EarlyStopping` on `val/cross_entropy` ends the stage on a plateau. The reinforcement stage
    takes the checkpoint as `policy.checkpoint`.

    Args:
        policy: with `mtp`, the heads.
        solutions: imitate the data's solutions instead of sampling.
        pool: how many samples are drawn at once.
        temperature: of sampling and of the heads' distributions; the one that reinforcement
            learning will use.
        batches_per_epoch: micro-batches between two epoch ends.
        optimizer: of the heads.
        scheduler: of the learning rate, stepped per update; None: constant.
        seed: of the samples; None: `seed_everything`.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        solutions: bool = False,
        pool: SamplePool = SamplePool(),
        temperature: float = 1.0,
        batches_per_epoch: int = 100,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if policy.masked:
            raise UserError(
                "`HeadWarmup` trains multi-token heads of a causal model, and "
                f"`{type(policy).__name__}` is a masked one; use `SupervisedWarmup`"
            )
        if policy.mtp is None:
            raise UserError(
                "`HeadWarmup` trains `policy.mtp`, and the policy has none; give "
                "`ParallelHeads`, say"
            )
        # options out of range
        at_least("HeadWarmup", 1, batches_per_epoch=batches_per_epoch)
        temperatures("HeadWarmup", temperature=temperature)
        seeds("HeadWarmup", seed=seed)
        self.policy = policy
        self.solutions = solutions
        self.pool = pool
        self.temperature = temperature
        self.batches_per_epoch = batches_per_epoch
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.strict_loading = False
        self._pool: tuple[int, Rollout] | None = None
        self._sums: Tensor | None = None

    @property
    def offsets(self) -> int:
        """M."""
        assert self.policy.mtp is not None
        return self.policy.mtp.offsets

    @property
    def data(self) -> PromptDataModule:
        """The data module."""
        return prompts_of(self.trainer)

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        check_trainer(self.trainer)
        if stage == "fit":
            try_optimizer(self.optimizer, self.scheduler, updates=self.trainer.max_steps)
        # the pool must divide over processes and passes
        prompts, rest = divmod(self.pool.prompts, self.trainer.world_size)
        if rest:
            raise UserError(
                f"`pool.prompts` ({self.pool.prompts}) must divide evenly over "
                f"{self.trainer.world_size} processes"
            )
        rows = prompts if self.solutions else prompts * self.pool.completions
        if rows % self.pool.passes:
            made = "one solution each" if self.solutions else f"{self.pool.completions} completions"
            raise UserError(
                f"`HeadWarmup.pool.passes` ({self.pool.passes}) must divide the {rows} samples "
                f"of a pool on each process ({prompts} prompts x {made})"
            )
        # heads and data fit the policy
        self.policy.check(ScoreRequest(future=self.offsets))
        check_imitation(self.data.curriculum, "HeadWarmup")
        self.data.connect(self.policy.tokenizer, self.policy.end_tokens)
        if self.solutions:
            self.data.check_solutions(self.policy.positions)
        else:
            prompted = [
                *self.data.validation_rows,
                *(self.data.splits.train if stage == "fit" else ()),
            ]
            check_fit(
                self.policy,
                self.data,
                prompted,
                self.pool.max_new_tokens,
                "HeadWarmup.pool.max_new_tokens",
            )

    def configure_model(self) -> None:
        build_policy(self, self.policy, reference=False, freeze=self._freeze_trunk)

    def _freeze_trunk(self) -> None:
        for name, weight in self.policy.named_parameters():
            weight.requires_grad_(name.startswith("mtp."))

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

    # --- samples -----------------------------------------------------------------------------

    def _draw(self, prompts: PromptBatch, completions: int, generator: torch.Generator) -> Rollout:
        with self.trainer.precision_plugin.forward_context():
            return LocalSampler().sample(
                self.policy,
                prompts,
                completions,
                SamplingRequest(FullVocabulary(), self.temperature, self.pool.max_new_tokens),
                generator=generator,
            )

    def _own(self, rows: list[PromptRow]) -> list[PromptRow]:
        """This process's part."""
        rank, share = self.trainer.global_rank, self.pool.prompts // self.trainer.world_size
        return rows[rank * share : (rank + 1) * share]

    def _rows(self, position: int) -> Rollout:
        """Return micro-batch `position`, a pure function of position and seed."""
        number, part = divmod(position, self.pool.passes)
        if self._pool is None or self._pool[0] != number:
            prompts = self._own(self.data.training_rows(number, self.pool.prompts))
            if self.solutions:
                pool = to_device(self.data.solutions(prompts), self.device)
            else:
                draws = generator_of(self.seed, Stream.HEADS, number, self.trainer.global_rank)
                pool = self._draw(self.data.encode(prompts), self.pool.completions, draws)
            self._pool = number, pool
        pool = self._pool[1]
        index = torch.arange(part, len(pool.group_B), self.pool.passes, device=pool.group_B.device)
        return trim_rollout(take_rows(pool, index))

    # --- training ----------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        rollout = self._rows(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        errors_M, counts_M = self._errors(rollout)
        totals_M = counts_M
        if self.trainer.world_size > 1:
            totals_M = self.trainer.strategy.reduce(counts_M, reduce_op="sum")
        parts_M = errors_M / totals_M.clamp(min=1)
        for n, value in enumerate((errors_M.detach() / counts_M.clamp(min=1)).tolist(), start=1):
            self.log(f"cross_entropy_{n}", value)
        loss = parts_M.mean()
        self.log("loss", loss.detach() * self.trainer.world_size, prog_bar=True, sync_dist=True)
        return loss * self.trainer.world_size

    def _errors(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the sum of -log q_n and the number of tokens per offset, shapes `[M]`."""
        mask_BT = rollout.response_mask_BT
        request = ScoreRequest(future=self.offsets)
        future_BTM = self.policy.score(
            rollout, mask_BT, temperature=self.temperature, request=request
        ).future_BTM
        assert future_BTM is not None
        counts_M = torch.stack([window(mask_BT, n).sum() for n in range(1, self.offsets + 1)])
        return -future_BTM.sum((0, 1)), counts_M.float()

    # --- validation --------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(3, self.offsets + 1, dtype=torch.float64)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        if self.solutions:
            rollout = to_device(self.data.solutions(list(batch.rows)), self.device)
        else:  # the same samples each time
            draws = generator_of(
                self.seed, Stream.HEADS_HELD_OUT, batch_idx, self.trainer.global_rank
            )
            rollout = self._draw(batch, 1, draws)
        mask_BT = rollout.response_mask_BT
        ranks_BTN = self.policy.ranks(rollout, mask_BT, self.offsets)
        errors_M, _ = self._errors(rollout)
        assert self._sums is not None
        for n in range(self.offsets + 1):
            there_BT = window(mask_BT, n)
            self._sums[0, n] += ((ranks_BTN[..., n] == 0) & there_BT).sum().item()
            self._sums[1, n] += errors_M[n - 1].item() if n else 0.0
            self._sums[2, n] += there_BT.sum().item()

    def on_validation_epoch_end(self) -> None:
        sums = self._sums
        assert sums is not None
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        first, errors, counts = sums.tolist()
        for n, count in enumerate(counts):
            self.log(
                f"val/accuracy_{n}", first[n] / max(count, 1.0), prog_bar=n in (1, self.offsets)
            )
            if n:
                self.log(f"val/cross_entropy_{n}", errors[n] / max(count, 1.0))
        means = [errors[n] / max(counts[n], 1.0) for n in range(1, self.offsets + 1)]
        self.log("val/cross_entropy", sum(means) / len(means), prog_bar=True)

    # --- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the heads, and the trunk if it cannot be reloaded from its source."""
        keep_trained(checkpoint, self.policy)
        checkpoint["mtp"] = self.policy.describe_heads()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_epoch_end(checkpoint)
        self.policy.check_heads(checkpoint.get("mtp"), "the checkpoint")
