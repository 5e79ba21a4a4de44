"""Watches how far the policy drifts from the supports it is trained on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional.support_diagnostics import support_overlap
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.types import take_rows, to_device


class SupportOverlap(RolloutCallback):
    """Logs `support/overlap`: the share of stored supports that the policy would choose again.

    Supports are never recomputed within a rollout, so that ratios stay exact; this says how old
    they have become. Logged with the last update of a rollout (and repeated by Lightning until the
    next look). Costs a pass of the full head over `rows` responses.

    Args:
        every: rollouts from one look to the next.
        rows: responses to look at, the first ones of a rollout, on each process.
    """

    def __init__(self, every: int = 10, rows: int = 16) -> None:
        at_least("SupportOverlap", 1, every=every, rows=rows)
        self.every, self.rows = every, rows

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, PolicyOptimization) and pl_module.policy.masked:
            raise UserError(
                "`SupportOverlap` asks a causal model for supports from left to right, and "
                f"`{type(pl_module.policy).__name__}` reveals tokens in any order: leave it out of "
                "the callbacks"
            )
        if isinstance(pl_module, PolicyOptimization) and pl_module.objective.support.by_step:
            raise UserError(
                "`SupportOverlap` compares supports with the most probable tokens, and the first "
                "one of `FirstTokens` is fixed: leave it out of the callbacks"
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization) or not batch["last_of_rollout"]:
            return
        if (pl_module.source.counter - 1) % self.every == 0:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        rollout = module.source.experience.rollout
        if rollout.support_BTK is None or not isinstance(module.policy, CausalPolicy):
            return
        part = take_rows(
            rollout,
            torch.arange(min(self.rows, len(rollout.group_B)), device=rollout.group_B.device),
        )
        part = to_device(part, module.device)  # after a resume the experience is on the CPU
        assert part.support_BTK is not None
        mask_BT = part.response_mask_BT
        with trainer.precision_plugin.forward_context():
            today_BTK = module.policy.top_k(part, mask_BT, part.support_BTK.shape[-1])
        overlap_BT = support_overlap(part.support_BTK, today_BTK, part.support_mask_BTK)
        sums = torch.stack([overlap_BT[mask_BT].sum(), mask_BT.sum()]).float()
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        module.log("support/overlap", sums[0] / sums[1], on_step=True, on_epoch=False)
