"""Accounts for memory: its peak in each phase, what quantisation and a shared reference save, and whether the base moved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_mpo.checks import at_least
from lightning_mpo.memory.footprint import Footprint, footprint
from lightning_mpo.memory.resident import PhasePeaks, resident_bytes
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.policies.checksums import check_moved, checksums
from lightning_mpo.rollout.events import RolloutEvent

PHASES = ("load", "rollout", "score", "forward", "backward", "optimiser")
"""`score` is what follows sampling at rollout weights: rewards, old and reference log-probs; `forward` an update's own."""
MIB = 2**20


class MemoryAccounting(RolloutCallback):
    """Logs the peak of each phase (`memory/<phase>_mib`) and writes `memory.json` and `memory.png` into the run folder.

    On the CPU a peak is of the process's resident set, read every few milliseconds (`memory/<phase>_in_use_mib`: without what the
    heap keeps of freed memory); on CUDA of the bytes that tensors hold (`memory/<phase>_reserved_mib`: that the allocator
    holds). Rank 0's. A quantised base is summed up at the start, every `canary_every` rollouts and at the end, and the run stops
    where a byte of it has moved.

    Args:
        canary_every: rollouts from one check of the quantised bytes to the next; 0: at the end alone.
        write: write `memory.json` and `memory.png`; False only measures.
    """

    def __init__(self, canary_every: int = 50, write: bool = True) -> None:
        at_least("MemoryAccounting", 0, canary_every=canary_every)
        self.canary_every, self.write = canary_every, write
        self.watch = PhasePeaks()
        self.baseline = 0
        """Bytes of the process before the policy was loaded."""
        self.heap_every = 4
        """Readings of the resident set for one of the heap, which takes longer; 1 misses the least."""
        self.footprint: Footprint | None = None
        self.held = {"gradients": 0, "optimiser": 0}
        """Bytes of gradients and optimiser state at the last update."""
        self._checksums: dict[str, int] = {}

    # --- phases ---------------------------------------------------------------------------------------------------

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
        self.held["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)

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
            self.held["optimiser"] = sum(
                _state_bytes(optimizer) for optimizer in trainer.optimizers
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

    # --- what is said ---------------------------------------------------------------------------------------------

    def peaks(self) -> dict[str, int]:
        """Return the peak of each phase so far, in bytes: of tensors on CUDA, else of the resident set."""
        cuda = self.watch.cuda
        found = {phase: self.watch.peaks[phase] for phase in PHASES if phase in self.watch.peaks}
        return {phase: peak.allocated if cuda else peak.resident for phase, peak in found.items()}

    def _log(self, module: PolicyOptimization) -> None:
        peaks = self.peaks()
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
        folder.mkdir(parents=True, exist_ok=True)
        peaks = {phase: self.watch.peaks[phase] for phase in PHASES if phase in self.watch.peaks}
        summary = {
            "device": "cuda" if self.watch.cuda else "cpu",
            "baseline": self.baseline,
            "peaks": {phase: asdict(peak) for phase, peak in peaks.items()},
            "weights": asdict(self.footprint),
            **self.held,
            "quantised tensors unmoved": len(self._checksums),
        }
        (folder / "memory.json").write_text(json.dumps(summary, indent=1) + "\n")
        cuda = self.watch.cuda
        used = {phase: peak.allocated if cuda else peak.in_use for phase, peak in peaks.items()}
        kept = {
            phase: (peak.reserved if cuda else peak.resident) - used[phase]
            for phase, peak in peaks.items()
        }
        draw_memory(used, kept, self.baseline, self.footprint, self.held, folder / "memory.png")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)
    )


def parts_of(
    peaks: dict[str, int],
    kept: dict[str, int],
    baseline: int,
    weights: Footprint,
    held: dict[str, int],
) -> dict[str, list[int]]:
    """Split the peak of each phase into what is known to be held and the rest, in bytes.

    Args:
        peaks: bytes in use, by phase.
        kept: what the allocator keeps beside them of what was freed.
        baseline: of the process before loading.
        weights: of the policy.
        held: gradients and optimiser state.
    """
    grads = [held["gradients"] if phase in ("backward", "optimiser") else 0 for phase in peaks]
    state = [held["optimiser"] if phase != "load" else 0 for phase in peaks]
    parts = {
        "process before loading": [baseline] * len(peaks),
        "base": [weights.base] * len(peaks),
        "reference copy": [weights.reference] * len(peaks),
        "adapters, heads": [weights.adapters + weights.parts] * len(peaks),
        "optimiser state": state,
        "gradients": grads,
    }
    known = [sum(column) for column in zip(*parts.values(), strict=True)]
    parts["activations, caches, buffers"] = [
        max(0, peak - size) for peak, size in zip(peaks.values(), known, strict=True)
    ]
    parts["kept by the allocator"] = list(kept.values())
    return {name: sizes for name, sizes in parts.items() if any(sizes)}


def draw_memory(
    peaks: dict[str, int],
    kept: dict[str, int],
    baseline: int,
    weights: Footprint,
    held: dict[str, int],
    path: Path,
) -> None:
    """Plot the peak of each phase by part, and beside it the weights against what they would be otherwise.

    Args:
        peaks: bytes in use, by phase.
        kept: what the allocator keeps beside them of what was freed.
        baseline: of the process before loading.
        weights: of the policy.
        held: gradients and optimiser state.
        path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(11, 4.5),
        layout="constrained",
        width_ratios=(3, 2),
        gridspec_kw={"wspace": 0.05},
    )
    foot = [0.0] * len(peaks)
    for name, sizes in parts_of(peaks, kept, baseline, weights, held).items():
        heights = [size / MIB for size in sizes]
        look = (
            {"color": "none", "edgecolor": "tab:gray", "hatch": "//"}
            if name.startswith("kept")
            else {}
        )
        left.bar(list(peaks), heights, bottom=foot, label=name, **look)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    for index, (size, top) in enumerate(zip(peaks.values(), foot, strict=True)):
        left.annotate(
            f"{size / MIB:.0f} in use", (index, top), ha="center", va="bottom", fontsize=8
        )
    left.set(ylabel="MiB", title="peak of each phase")
    left.margins(y=0.12)
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    bars = {
        "bf16 policy\n+ bf16 copy": (2 * weights.numbers, 0, 2 * weights.numbers),
        "this policy\n+ a copy": (weights.base, weights.adapters, weights.base),
        "this run": (weights.base, weights.adapters, weights.reference),
    }
    foot = [0.0] * len(bars)
    for index, name in enumerate(("base", "adapters", "reference")):
        heights = [sizes[index] / MIB for sizes in bars.values()]
        right.bar(list(bars), heights, bottom=foot, label=name)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    for index, total in enumerate(foot):
        right.annotate(
            f"{total:.0f} ({total / foot[0]:.2f}x)",
            (index, total),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    right.set(ylabel="MiB", title="weights of policy and reference")
    right.margins(y=0.12)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
