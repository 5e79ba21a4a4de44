"""Watches the divergence from the reference."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.checks import at_least, positive
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.rollout.experience import divergence_from_reference, mean_over_ranks


class KLTracking(RolloutCallback):
    """Logs the k3 divergence from the reference, and can stop the run.

    With `ReferenceUpdate` that is the reference as it last became, also for `stop_above`, and not
    the policy as the run began.

    Args:
        every: rollouts from one look to the next, each of which costs a forward pass of the
            reference; an objective with a KL penalty scores every rollout anyway.
        stop_above: mean divergence (nats per token) at which training stops; None: never.
    """

    def __init__(self, every: int = 1, stop_above: float | None = None) -> None:
        at_least("KLTracking", 1, every=every)
        positive("KLTracking", stop_above=stop_above)
        self.every, self.stop_above = every, stop_above
        self._seen = 0.0
        """The divergence that the run was stopped at."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, PolicyOptimization):
            pl_module.keep_reference = True
            pl_module.reference_every = 1 if pl_module.objective.needs_reference else self.every

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        trained = event.experience if event.trained is None else event.trained
        values = divergence_from_reference(trained, module.objective.likelihood)
        if values is None:
            return
        mean, largest = mean_over_ranks(module.over_ranks, values), values.max()
        if trainer.world_size > 1:
            largest = trainer.strategy.reduce(largest, reduce_op="max")
        module.log_with_update({"kl/rollout_mean": mean, "kl/rollout_max": largest.item()})
        if self.stop_above is not None and mean > self.stop_above:
            self._stop(trainer, mean)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (
            self.stop_above is not None and self._seen > self.stop_above
        ):  # the run was killed behind its last save
            self._stop(trainer, self._seen)

    def _stop(self, trainer: L.Trainer, mean: float) -> None:
        rank_zero_warn(
            f"stopping: the policy is {mean:.3g} nats per token from its reference, over "
            f"`KLTracking.stop_above` ({self.stop_above}); lower the learning rate or raise the "
            "KL coefficient"
        )
        self._seen, trainer.should_stop = mean, True

    def state_dict(self) -> dict[str, float]:
        return {"seen": self._seen} if self._seen else {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._seen = state_dict["seen"]
