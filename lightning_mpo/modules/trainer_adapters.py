"""A trainer as a `Collector` sees it: processes that share a rollout, and callbacks."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.modules.evaluation import RolloutEvaluation
from lightning_mpo.modules.hooks import listeners, tell_phase
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.events import Listener
from lightning_mpo.rollout.ranks import Ranks


class TrainerRanks(Ranks):
    """The processes of a trainer.

    Each sum also counts the processes on which a reward has failed, so that all of them end
    together.
    """

    def __init__(
        self, trainer: L.Trainer, module: PolicyOptimization, source: RolloutEvaluation
    ) -> None:
        self.rank, self.size = trainer.global_rank, trainer.world_size
        self._module, self._source = module, source

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return values
        flat = torch.cat([values.flatten(), values.new_tensor([self._source.failures])])
        flat = self._module.over_ranks(flat.to(self._module.device)).to(values.device)
        self._source.end_failed(float(flat[-1]))
        return flat[:-1].view_as(values)


class TrainerListener(Listener):
    """Passes the events of a rollout to the callbacks of a trainer."""

    def __init__(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        self._trainer, self._module, self._callbacks = trainer, module, listeners(trainer)

    def phase(self, name: str) -> None:
        tell_phase(self._trainer, name)

    def tokens(self, drawn: int, running: int) -> None:
        for callback in self._callbacks:
            callback.on_rollout_tokens(drawn, running)

    def sampled(self) -> None:
        for callback in self._callbacks:
            callback.on_rollout_sampled(self._trainer, self._module)

    def note(self, line: str) -> None:
        rank_zero_info(line)

    def warn(self, line: str) -> None:
        rank_zero_warn(line)
