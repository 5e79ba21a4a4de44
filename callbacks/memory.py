"""Measures memory: the peak of each phase, and the savings by quantisation and shared weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_mpo.checks import at_least
from lightning_mpo.memory.drawing import MIB, draw_memory
from lightning_mpo.memory.footprint import Footprint, footprint
from lightning_mpo.memory.resident import Peak, PhasePeaks, resident_bytes
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.policies.checksums import check_moved, checksums
from lightning_mpo.rollout.events import RolloutEvent

PHASES = ("load", "rollout", "score", "forward", "backward", "optimiser")
"""`score`: rewards, old and reference log-probs, after sampling. `forward`: of an update."""


class MemoryAccounting(RolloutCallback):
    """Logs the peak of each phase (`memory/<phase>_mib`).

    Writes `memory.json` and `memory.png` into the run folder. All values are of rank 0.

    On the CPU a peak is of the process's resident set, read every few milliseconds.
    `memory/<phase>_in_use_mib` leaves out freed memory that the heap keeps. On CUDA a peak is of
    the bytes of tensors; `memory/<phase>_reserved_mib` is of the bytes that the allocator holds.

    A quantised base never changes in training. Its checksums are taken at the start, and compared
    every `canary_every` rollouts and at the end. The run stops if a byte has changed.

    Args:
        canary_every: rollouts from one check of the quantised bytes to the next; 0: only at the
            end.
        write: write `memory.json` and `memory.png`; False only measures.
    """

    def __init__(self, canary_every: int = 50, write: bool = True) -> None:
        at_least("MemoryAccounting", 0, canary_every=canary_every)
        self.canary_every, self.write = canary_every, write
        self.watch = PhasePeaks()
        self.baseline = 0
        """Bytes of the process before the policy was loaded."""
        self.heap_every = 4
        """Readings of the resident set for each slower reading of the heap; 1 misses the least."""
        self.footprint: Footprint | None = None
        self.update_bytes = {"gradients": 0, "optimiser": 0}
        """Bytes of gradients and optimiser state at the last update."""
        self._checksums: dict[str, int] = {}

    # --- phases ------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, PolicyOptimization):
            cuda = trainer.strategy.root_device.type == "cuda"
            self.baseline = torch.cuda.memory_allocated() if cuda else resident_bytes()
            self.watch = PhasePeaks(cuda, heap_every=self.heap_every)
            self.watch.start("load")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.enter(None)
        if isinstance(pl_module, PolicyOptimization):
            self.footprint = footprint(pl_module.policy)
            self._checksums = checksums(pl_module.policy)
            rank_zero_info(f"memory     {self.footprint.describe()}")

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        self.watch.enter("rollout")

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        if self.watch.phase == "score":  # another round of dynamic sampling
            self.watch.enter("rollout")

    def on_rollout_sampled(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        self.watch.enter("score")

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        self.watch.enter(None)
        self._log(module)
        if self.canary_every and event.counter and event.counter % self.canary_every == 0:
            check_moved(module.policy, self._checksums)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.watch.enter("forward")

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        self.watch.enter("backward")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.watch.enter("optimiser")
        grads = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
        self.update_bytes["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.watch.enter(None)
        if isinstance(pl_module, PolicyOptimization) and batch.get("last_of_update"):
            self.update_bytes["optimiser"] = sum(
                _optimizer_state_bytes(optimizer) for optimizer in trainer.optimizers
            )
            self._log(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.watch.stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.stop()
        if isinstance(pl_module, PolicyOptimization):
            check_moved(pl_module.policy, self._checksums)
            if self.write and not is_fast_dev_run(trainer):
                self._write(Path(trainer.default_root_dir))

    # --- metrics and files -------------------------------------------------------------------

    def peaks(self) -> dict[str, int]:
        """Return the peak of each phase so far, in bytes.

        On CUDA these are bytes of tensors, else of the resident set.
        """
        cuda = self.watch.cuda
        return {
            phase: peak.allocated if cuda else peak.resident
            for phase, peak in self._ordered_peaks().items()
        }

    def _ordered_peaks(self) -> dict[str, Peak]:
        """Return the peaks so far, in the order of `PHASES`."""
        return {phase: self.watch.peaks[phase] for phase in PHASES if phase in self.watch.peaks}

    def _log(self, module: PolicyOptimization) -> None:
        peaks = self.peaks()
        # peaks by phase
        metrics = {f"memory/{phase}_mib": size / MIB for phase, size in peaks.items()}
        metrics["memory/peak_mib"] = max(peaks.values()) / MIB
        if self.watch.cuda:
            metrics |= {
                f"memory/{phase}_reserved_mib": peak.reserved / MIB
                for phase, peak in self.watch.peaks.items()
            }
            metrics["memory/resident_mib"] = (
                max(peak.resident for peak in self.watch.peaks.values()) / MIB
            )
        else:
            metrics |= {
                f"memory/{phase}_in_use_mib": peak.in_use / MIB
                for phase, peak in self.watch.peaks.items()
            }
        # weights, and their ratio to two models in bf16 and to a run with a full copy
        if self.footprint is not None:
            metrics["memory/weights_mib"] = self.footprint.policy_and_reference / MIB
            metrics["memory/of_bf16_pair"] = (
                self.footprint.policy_and_reference / self.footprint.bf16_pair
            )
            metrics["memory/of_own_pair"] = (
                self.footprint.policy_and_reference / self.footprint.with_copy
            )
        module.log_with_update(metrics, progress_bar=("memory/peak_mib",))

    @rank_zero_only
    def _write(self, folder: Path) -> None:
        if self.footprint is None:
            return
        # numbers
        folder.mkdir(parents=True, exist_ok=True)
        peaks = self._ordered_peaks()
        summary = {
            "device": "cuda" if self.watch.cuda else "cpu",
            "baseline": self.baseline,
            "peaks": {phase: asdict(peak) for phase, peak in peaks.items()},
            "weights": asdict(self.footprint),
            **self.update_bytes,
            "quantised tensors unmoved": len(self._checksums),
        }
        (folder / "memory.json").write_text(json.dumps(summary, indent=1) + "\n")
        # picture: bytes in use, and beside them freed bytes that the allocator or the heap holds
        cuda = self.watch.cuda
        in_use = {phase: peak.allocated if cuda else peak.in_use for phase, peak in peaks.items()}
        allocator_free = {
            phase: (peak.reserved if cuda else peak.resident) - in_use[phase]
            for phase, peak in peaks.items()
        }
        draw_memory(
            in_use,
            allocator_free,
            self.baseline,
            self.footprint,
            self.update_bytes,
            folder / "memory.png",
        )


def _optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)
    )
