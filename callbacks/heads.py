"""Diagnostics of multi-token heads during training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional.head_diagnostics import BINS, expected_calibration_error
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.future_credit import OutcomeCredit, StateCredit
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.rollout.head_measures import HeadMeasures, rows_with_credit
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import take_rows

AVERAGED = 2
"""Number of measurements whose mean is compared with the threshold of the warning."""
RESPONSES_PER_ROW = 100
"""Number of sampled responses per row that is measured, with `every` None.

A measurement costs about ten forward passes per row. A step costs at least five per response, and
its sampling.
"""
LARGEST_SPURIOUS = 0.5
"""Threshold of the warning [I].

In one run each, MPO on PPO began at 0.7 to 1.0. MPO on GRPO had means of two below 0.2 (docs/mpo.md).
"""


class HeadDiagnostics(RolloutCallback):
    """Logs calibration and gradients of multi-token heads, and warns once if they mislead the policy.

    It measures before the first update on a rollout (docs/algorithms.md 15.1):

    * `mtp/ece_{n}`: expected calibration error of head n, in 10 bins of equal width.
    * `mtp/excess_entropy_{n}`: KL(p_n‖q_n) in nats. p_n is the policy's distribution n tokens ahead,
      estimated from sampled continuations. A bias of order 1/`samples`² remains, so that values may
      be below 0.
    * `mtp/trunk_gradient_future`: norm of the trunk's gradient from the later tokens of blocks,
      divided by the norm of that from their first tokens.
    * `mtp/spurious`: norm of the part of the former along the heads' cross-entropy, divided by the
      same norm.

    Gradients are those of the surrogate alone, over the first groups with an advantage. Three
    gradients of the trunk are in memory for a moment. With several processes the values are means
    over processes. Training is the same with this callback and without it.

    Args:
        every: number of rollouts from one measurement to the next. None: the number of rollouts
            with 100 times `rows` responses, which keeps the cost below 2 % of the run.
        rows: number of responses for calibration and gradients, on each process.
        states: number of states of these responses from which continuations are sampled.
        samples: number of continuations of each state.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self, every: int | None = None, rows: int = 16, states: int = 16, samples: int = 8
    ) -> None:
        at_least("HeadDiagnostics", 1, every=every, rows=rows, states=states)
        at_least("HeadDiagnostics", 2, samples=samples)
        self.every, self.rows = every, rows
        self.states, self.samples = states, samples
        self._last: list[float] = []
        """The last values of `mtp/spurious`, at most `AVERAGED`."""
        self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            raise UserError(
                "`HeadDiagnostics` measures rollouts, and "
                f"`{type(pl_module).__name__}` makes none; leave it out of the callbacks"
            )
        if pl_module.policy.masked:
            raise UserError(
                "`HeadDiagnostics` measures multi-token heads, which "
                f"`{type(pl_module.policy).__name__}` has not, as it is a masked language model: "
                "leave it out of the callbacks"
            )
        actions = pl_module.objective.actions
        if not actions.future:
            raise UserError(
                "`HeadDiagnostics` measures multi-token heads, and "
                f"`objective.actions: {type(actions).__name__}` uses none; use `BlockActions` "
                "with `source: mtp` and heads (-c mpo -c mtp), or leave `HeadDiagnostics` out"
            )
        policy = pl_module.policy
        if not isinstance(policy, CausalPolicy) or policy.mtp is None:
            raise UserError(
                "`HeadDiagnostics` measures multi-token heads, and the policy has none; give "
                "`policy.mtp` (-c mtp), or leave `HeadDiagnostics` out"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "`HeadDiagnostics` takes gradients of whole weights, and FSDP2 keeps them in "
                "shards; use `trainer.strategy: ddp` (-c ddp), or leave `HeadDiagnostics` out"
            )

    def interval(self, responses: int) -> int:
        """Return the number of rollouts from one measurement to the next.

        Args:
            responses: number of responses of a rollout, on each process.
        """
        return self.every or -(-RESPONSES_PER_ROW * self.rows // responses)

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        if event.counter % self.interval(len(event.experience.rewards_B)) == 0:
            cuda = module.device.type == "cuda"
            # dropout of adapters draws from the global generators
            with torch.random.fork_rng(devices=[module.device] if cuda else []):
                self._measure(trainer, module, event)

    def _measure(self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent) -> None:
        source, policy, experience = module.source, module.policy, event.experience
        assert isinstance(policy, CausalPolicy)
        assert isinstance(source, RolloutLoop)
        offsets = module.objective.actions.future
        measures = HeadMeasures(module.scorer(), policy, offsets)
        # calibration and entropy, on the first rows
        few = torch.arange(min(self.rows, len(experience.rewards_B)))
        part = take_rows(experience.rollout, few.to(experience.rewards_B.device))
        generator = generator_of(source.seed, Stream.DIAGNOSE, event.counter, trainer.global_rank)
        bins = measures.calibration(part)
        excess = measures.excess(
            part,
            module.objective.support,
            states=self.states,
            samples=self.samples,
            generator=generator,
        )
        # gradients, in passes that are no larger than an update's
        rows = rows_with_credit(experience, self.rows)
        gradients = measures.gradients(
            module.objective, take_rows(experience, rows), _rows_of_a_pass(source)
        )
        is_finite = gradients.isfinite().all()
        gradient_sums = torch.cat(
            [gradients.nan_to_num(0, 0, 0) * is_finite, is_finite.double()[None]]
        )
        # over all processes
        parts = [bins, excess, gradient_sums]
        flat = torch.cat([values.flatten().to(module.device) for values in parts])
        sums = module.over_ranks(flat).cpu().split([values.numel() for values in parts])
        self._log(module, sums[0].view(offsets, BINS, 3), sums[1].view(offsets, 2), sums[2])

    def _log(
        self, module: PolicyOptimization, bins: Tensor, excess: Tensor, gradients: Tensor
    ) -> None:
        metrics: dict[str, float] = {}
        for n, (by_bin, (total, number)) in enumerate(zip(bins, excess, strict=True), start=1):
            if by_bin.any():
                metrics[f"mtp/ece_{n}"] = float(expected_calibration_error(by_bin))
            if number:
                metrics[f"mtp/excess_entropy_{n}"] = float(total / number)
        if gradients[2]:
            future, spurious = (gradients[:2] / gradients[2]).tolist()
            metrics |= {"mtp/trunk_gradient_future": future, "mtp/spurious": spurious}
            self._judge(module, spurious)
        module.log_with_update(metrics)

    def _judge(self, module: PolicyOptimization, spurious: float) -> None:
        """Warn once if the mean of the last measurements is above the threshold."""
        self._last = [*self._last, spurious][-AVERAGED:]
        mean = sum(self._last) / len(self._last)
        if self._warned or len(self._last) < AVERAGED or mean <= LARGEST_SPURIOUS:
            return
        self._warned = True
        rank_zero_warn(
            f"`mtp/spurious` is {mean:.3g} in the mean of {AVERAGED} measurements: the later "
            "tokens of blocks move the policy along the heads' cross-entropy, with this many times "
            f"the gradient norm of the first tokens; {_remedy(module)}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"last": list(self._last), "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self._warned = list(state_dict["last"]), state_dict["warned"]


def _rows_of_a_pass(source: RolloutLoop) -> int:
    """Return the number of rows of a micro-batch."""
    schedule = source.schedule
    assert schedule is not None
    return max(1, schedule.rows // (schedule.minibatches * schedule.micro_batches))


def _remedy(module: PolicyOptimization) -> str:
    """Return advice: the options to change."""
    actions: Any = module.objective.actions
    credit = actions.credit if isinstance(actions, BlockActions) else None
    bounded = isinstance(credit, OutcomeCredit | StateCredit) and credit.negatives != "keep"
    detach = "`policy.mtp.detach_trunk: true`"
    if bounded or module.source.completions < 2:
        return f"set {detach}, or lower `FutureShare.share`"
    return (
        "set `objective.actions.credit` to `StateCredit` with `negatives: bound` (or to "
        f"`OutcomeCredit`), or {detach}"
    )
