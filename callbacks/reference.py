"""Moves the reference after the policy."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mpo.callbacks.kl import KLTracking
from lightning_mpo.callbacks.report import Report
from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.checks import at_least, within
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.rewards.reference import ReferenceReward


class ReferenceUpdate(RolloutCallback):
    """Mixes the policy into its reference, before a rollout is sampled:

        reference <- mixup · policy + (1 - mixup) · reference        every `every` rollouts

    as TRL's `ref_model_mixup_alpha` and `ref_model_sync_steps` do, which count updates [C]; TRL
    takes them from TR-DPO, arXiv:2404.09656 [S]. A rollout is sampled and scored with one
    reference. `mixup: 1` makes the reference the policy of that moment, a smaller one an
    exponential moving average of its weights.

    With LoRA the reference gets adapters of its own. Where it was the base with adapters off, they
    start as the A of the moment it first moves, and B = 0. A refresh (`mixup: 1`) copies A and B
    and is exact. A smaller m = `mixup` mixes A and B apart, as mixing what they add to the base
    would double the rank. That is not the same: (m B + (1 - m) B')(m A + (1 - m) A') differs from
    the mixture of the products by -m (1 - m) (B - B')(A - A'), times alpha / rank: of second order
    in how far policy and reference are apart.

    All that is said of a divergence (the KL penalty, `KLTracking`, `Report`), and supports with
    `from_reference`, are then against the reference as it last became. It is in checkpoints from
    the first time it moved.

    Args:
        every: rollouts from one time to the next.
        mixup: share of the policy, above 0 and up to 1.
    """

    def __init__(self, every: int, mixup: float = 1.0) -> None:
        at_least("ReferenceUpdate", 1, every=every)
        within("ReferenceUpdate", "(0, 1]", mixup=mixup)
        self.every, self.mixup = every, mixup
        self._policy: LoadedPolicy | None = None
        self._counter = 0
        """The rollout before which the reference last moved; 0: it is still the first one."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # rewards are against the policy at the start
        callbacks = callbacks_of(trainer)
        rewards = [
            reward
            for callback in callbacks
            if isinstance(callback, RolloutLoop)
            for reward in callback.rewards
            if isinstance(reward, ReferenceReward)
        ]
        if rewards:
            raise UserError(
                f"`{rewards[0].title}` reads log-probs of the policy at the start of the run, and "
                "`ReferenceUpdate` would move them: leave `ReferenceUpdate` out of the callbacks"
            )
        # something must use the reference
        if not isinstance(pl_module, PolicyOptimization) or not (
            pl_module.keep_reference
            or any(isinstance(callback, KLTracking | Report) for callback in callbacks)
        ):
            raise UserError(
                "`ReferenceUpdate` moves a reference, and nothing here asks for one: give "
                "`KLPenalty` in `objective.terms`, `KLTracking` or `Report`, or leave "
                "`ReferenceUpdate` out"
            )
        # weights must be whole, of a language model
        if not isinstance(pl_module.policy, LoadedPolicy):
            raise UserError(
                "`ReferenceUpdate` needs a `CausalPolicy` or a `MaskedPolicy`, got "
                f"{type(pl_module.policy).__name__}: leave `ReferenceUpdate` out of the callbacks"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "`ReferenceUpdate` mixes whole weights, and FSDP2 keeps them in shards; use "
                "`trainer.strategy: ddp` (-c ddp), or leave `ReferenceUpdate` out"
            )
        self._policy = pl_module.policy

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        counter = module.source.counter
        if counter > self._counter and counter % self.every == 0:
            self._need_policy().reference.mix(self.mixup)
            self._counter = counter

    def state_dict(self) -> dict[str, Any]:
        if not self._counter:
            return {}
        reference = {
            name: weight.cpu() for name, weight in self._need_policy().reference.state().items()
        }
        return {"counter": self._counter, "reference": reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._need_policy().reference.load(state_dict["reference"])
        self._counter = state_dict["counter"]

    def _need_policy(self) -> LoadedPolicy:
        if self._policy is None:
            raise RuntimeError("the policy is known from `setup` on")
        return self._policy
