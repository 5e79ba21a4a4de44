"""Makes rollouts and hands their micro-batches to the training loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L

from lightning_mpo.checks import at_least, positive, seeds
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.modules.evaluation import RolloutEvaluation
from lightning_mpo.modules.hooks import listeners, tell_phase
from lightning_mpo.modules.limits import fit_limits
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.parallel import gather_ranks, state_of_rank
from lightning_mpo.modules.reward_reference import need_reference
from lightning_mpo.modules.rollout_setup import (
    announce,
    check_accumulation,
    check_ks,
    check_likelihood,
    check_offsets,
    check_rewards,
    check_sampling,
    shorten_fast_dev_run,
)
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run, prompts_of
from lightning_mpo.modules.trainer_adapters import TrainerListener, TrainerRanks
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.token_ids import check_tokens
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.resolving import RewardLike, as_rewards
from lightning_mpo.rollout.collect import Collector
from lightning_mpo.rollout.dynamic import DynamicSampling
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.state import RolloutBuffer, check_progress
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.sampling.replay import PrefixReplay
from lightning_mpo.types import Experience, to_device


class RolloutLoop(RolloutEvaluation):
    """Samples completions, scores them and spends the result in updates.

    Args:
        rewards: rewards of completions, added with their weights: `Reward` objects, or functions
            as `FunctionReward` takes them. In a configuration also import paths, and
            `file.py:name`.
        prompts: prompts of a rollout, over all processes.
        completions: G, completions per prompt.
        max_new_tokens: longest response.
        minibatches: updates in one pass over a rollout.
        epochs: passes over a rollout.
        sampler: draws the responses; None: in this process, with the policy's weights.
        seed: seed of the sampling; None: `seed_everything`.
        validation_completions: completions per validation prompt; pass@1 is their mean.
        validation_ks: each k of pass@k and maj@k of a validation; None: 1.
        replay: restarts some completions inside others, for `PrefixTree`; None: all are sampled
            from the prompt.
        parity_gate: compare sampler and trainer before the first update, and refuse to train where
            they disagree.
        dynamic: replaces prompts that all completions answer right, or none; None: keeps them all.
        mask_truncated: responses that `max_new_tokens` cut off carry no loss and stand in no
            denominator. Their rewards still count in the mean and deviation of their group, and
            their accuracy in `dynamic`, as with TRL's `mask_truncated_completions` [C].
        reward_seconds: most seconds that one reward may take for one batch.
        reward_process: rewards of your own run in a helper process, which can crash, hang or be
            ended without the run; false: in the process of the run, where the time limit does not
            interrupt code in C. The command line takes true.
        failed_reward: score of a completion on which a reward failed; None: it is not judged.
        stop: tokens that end a response besides the end tokens of the policy, and belong to it. A
            text stands for each token that contains it. The response then counts as finished.
    """

    def __init__(
        self,
        rewards: Sequence[RewardLike] = (),
        prompts: int = 8,
        completions: int = 4,
        max_new_tokens: int = 256,
        minibatches: int = 1,
        epochs: int = 1,
        sampler: Sampler | None = None,
        seed: int | None = None,
        validation_completions: int = 1,
        replay: PrefixReplay | None = None,
        parity_gate: bool = True,
        dynamic: DynamicSampling | None = None,
        mask_truncated: bool = False,
        reward_seconds: float = 1800.0,
        reward_process: bool = False,
        failed_reward: float | None = None,
        validation_ks: list[int] | None = None,
        stop: list[int | str] | None = None,
    ) -> None:
        super().__init__()
        # options out of range
        at_least("rollout", 1, prompts=prompts, completions=completions)
        at_least("rollout", 1, max_new_tokens=max_new_tokens, minibatches=minibatches)
        at_least("rollout", 1, epochs=epochs, validation_completions=validation_completions)
        seeds("rollout", seed=seed)
        positive("rollout", reward_seconds=reward_seconds)
        # rewards, and the process that calls them
        self.rewards = as_rewards(rewards)
        self.reward_seconds, self.reward_process = reward_seconds, reward_process
        self.caller = RewardCaller(self.rewards, reward_seconds, reward_process, failed_reward)
        self.prompts, self.completions, self.max_new_tokens = prompts, completions, max_new_tokens
        self.minibatches, self.epochs = minibatches, epochs
        self.sampler = sampler or LocalSampler()
        self._seed, self.failed_reward = seed, failed_reward
        self.validation_completions = validation_completions
        self.validation_ks = validation_ks or [1]
        check_ks("rollout.validation_ks", self.validation_ks, validation_completions)
        self.stop = list(stop or ())
        check_tokens("rollout.stop", self.stop)
        self.replay, self.parity_gate = replay, parity_gate
        self.dynamic, self.mask_truncated = dynamic, mask_truncated
        # state of the run
        self.counter = 0
        """Rollouts finished or under way."""
        self.schedule: Schedule | None = None
        self._data: PromptDataModule | None = None
        self._buffer: RolloutBuffer | None = None
        self._gate_passed = False
        """Whether sampler and trainer were compared, in this run or before a resume."""

    @property
    def seed(self) -> int:
        """Seed of the sampling."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    # --- set-up ------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        self.check(pl_module.policy, pl_module.objective, prompts_of(trainer), stage)
        pl_module.keep_reference |= need_reference(self.rewards, pl_module.policy)
        if stage == "fit":
            self._setup_fit(trainer, pl_module)

    def check(
        self, policy: Policy, objective: Objective, data: PromptDataModule, stage: str
    ) -> None:
        """Refuse options that do not fit each other, the policy, the objective or the data.

        Args:
            policy: its weights need not be loaded.
            objective: the algorithm.
            data: serves the prompts.
            stage: the command, such as "fit".

        Raises:
            UserError: names the option and the alternative.
        """
        check_rewards(self.rewards, data, stage, self.max_new_tokens)
        check_offsets(objective, self.max_new_tokens)
        check_likelihood(policy, objective)
        self.sampler.check_policy(policy)
        self.sampler.check_stop(self.stop)
        need_reference(self.rewards, policy)
        self.stop_ids(policy)
        self.sampler.check_canvas(self.max_new_tokens)
        if self.dynamic is not None:
            self.dynamic.check(self.rewards, self.completions)
        check_sampling(
            *(objective, self.rewards, self.completions),
            *(self.sampler, self.replay, self.mask_truncated),
        )

    def _setup_fit(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        check_accumulation(trainer)
        # this callback comes first in each slot: the others see a batch that is filled
        callbacks_of(trainer).sort(key=lambda callback: callback is not self)
        quick, likelihood = is_fast_dev_run(trainer), module.objective.likelihood
        if quick:
            shorten_fast_dev_run(trainer)
        self.schedule = Schedule(
            self.prompts,
            self.completions,
            minibatches=1 if quick else self.minibatches,
            epochs=1 if quick else self.epochs,
            micro_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            copies=None if likelihood is None else likelihood.repeats,
            whole_groups=module.objective.surrogate.compares_group,
        )
        fit_limits(trainer, self.schedule)
        self._data = prompts_of(trainer)
        announce(module.objective, self.schedule)

    @property
    def slots_per_epoch(self) -> int:
        rows = len(self._need_data().splits.train)  # after `connect`, which may skip rows
        return max(1, -(-rows // self.prompts)) * self._need_schedule().slots

    def _need_data(self) -> PromptDataModule:
        if self._data is None:
            raise RuntimeError("the data module is known from `setup` on")
        return self._data

    def _need_schedule(self) -> Schedule:
        if self.schedule is None:
            raise RuntimeError("the rollout schedule exists from `setup` on")
        return self.schedule

    # --- training ----------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        schedule = self._need_schedule()
        slot, buffer = trainer.fit_loop.epoch_loop.batch_idx % schedule.slots, self._buffer
        # a new rollout at its first slot
        if slot == 0 or buffer is None:
            tell_phase(trainer, "gathering weights")
            with pl_module.policy.full_weights():
                buffer = self._collect(trainer, pl_module)
        # the micro-batch of this slot; after a resume the experience is on the CPU
        update, micro = divmod(slot, schedule.micro_batches)
        batch["micro_batch"] = to_device(buffer.micro_batch(update, micro), pl_module.device)
        batch["denominators"] = buffer.denominators[update]
        batch["last_of_update"] = micro == schedule.micro_batches - 1
        batch["first_update"] = update == 0
        batch["last_of_rollout"] = slot == schedule.slots - 1

    def _collect(self, trainer: L.Trainer, module: PolicyOptimization) -> RolloutBuffer:
        """Make a rollout, call the hooks of other callbacks, and log its metrics."""
        # gradients of the last update would otherwise be alive during the rollout
        module.zero_grad(set_to_none=True)
        rows = self._need_schedule().sequences
        for callback in listeners(trainer):
            callback.on_rollout_start(trainer, module, rows, self.max_new_tokens)
        # prompts -> experience, plan and denominators
        every = module.reference_every
        collector = self.collector(trainer, module)
        order_metrics = self._need_data().order_metrics(self.counter)
        due = bool(every) and self.counter % every == 0
        collected = collector.collect(self.counter, reference=due)
        if self.parity_gate:
            self._gate_passed = not collector.parity_gate
        self._buffer, self.counter = collected.buffer, self.counter + 1
        for callback in listeners(trainer):
            callback.on_rollout_end(trainer, module, collected.event)
        metrics = collected.metrics | order_metrics
        module.log_with_update(metrics, progress_bar=("reward/mean", "reward/accuracy"))
        return collected.buffer

    def collector(self, trainer: L.Trainer, module: PolicyOptimization) -> Collector:
        """Return a collector with the options of this callback."""
        return Collector(
            scorer=module.scorer(),
            objective=module.objective,
            prompts=self._need_data(),
            sampler=self.sampler,
            judge=partial(self.judge, module),
            schedule=self._need_schedule(),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop_ids(module.policy),
            seed=self.seed,
            ranks=TrainerRanks(trainer, module, self),
            listener=TrainerListener(trainer, module),
            replay=self.replay,
            dynamic=self.dynamic,
            mask_truncated=self.mask_truncated,
            parity_gate=self.parity_gate and not self._gate_passed,
            learn=self._need_data().learner,
        )

    @property
    def experience(self) -> Experience:
        if self._buffer is None:
            raise RuntimeError("there is no rollout yet")
        return self._buffer.experience

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"counter": self.counter, "gate_passed": self._gate_passed}
        state["total_failures"] = self.caller.failures.total_failures
        if self._buffer is not None:
            state |= self._buffer.state_dict()
        curriculum = None if self._data is None else self._data.curriculum
        return {"ranks": gather_ranks(state), "curriculum": curriculum and curriculum.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_progress(state := state_of_rank(state_dict["ranks"]))
        if self._data is not None and self._data.curriculum is not None:
            self._data.curriculum.load_state_dict(state_dict["curriculum"])
        self.counter, self._gate_passed = state["counter"], state["gate_passed"]
        self.caller.failures.load(state.get("total_failures", {}))
        if "experience" in state:
            self._buffer = RolloutBuffer.from_state(state)
