"""Rolls out before the first update of each rollout and hands micro-batches to the training loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from textwrap import fill
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.checks import at_least, positive, seeds
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.evaluation import RolloutEvaluation
from lightning_mpo.modules.hooks import listeners, tell_phase
from lightning_mpo.modules.limits import fit_limits
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.parallel import gather_ranks, rank_and_world_size
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run, prompts_of
from lightning_mpo.resume.entries import is_count
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.resolving import RewardLike, as_rewards
from lightning_mpo.rollout.collect import Collector
from lightning_mpo.rollout.dynamic import DynamicSampling
from lightning_mpo.rollout.events import Listener
from lightning_mpo.rollout.ranks import Ranks
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.state import check_state, plain_state
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.sampling.replay import PrefixReplay
from lightning_mpo.scores import Denominators
from lightning_mpo.types import Experience, Rollout, take_rows, to_device


class TrainerRanks(Ranks):
    """The processes of a trainer; each sum also says on how many of them rewards have failed, and ends all together."""

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
    """Hands what happens in a rollout on to the callbacks of a trainer."""

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


class RolloutLoop(RolloutEvaluation):
    """Samples completions, scores them and spends the result in updates.

    Args:
        rewards: judgements of completions, summed by their weights: `Reward` objects, or functions as `FunctionReward`
            takes them. In a configuration also import paths, and `file.py:name`.
        prompts: prompts of a rollout, over all processes.
        completions: G, completions per prompt.
        max_new_tokens: longest response.
        minibatches: updates in one pass over a rollout.
        epochs: passes over a rollout.
        sampler: how responses are drawn; None: in process, on the policy's own weights.
        seed: of the sampling; None: `seed_everything`.
        validation_completions: completions per validation prompt; pass@1 is their mean.
        replay: restarts some completions inside others, for `PrefixTree`; None: all are sampled from the prompt.
        parity_gate: compare sampler and trainer before the first update, and refuse to train where they disagree.
        dynamic: replaces prompts that all completions answer right, or none; None: every prompt is trained on.
        mask_truncated: responses that `max_new_tokens` cut off carry no loss and stand in no denominator. Their rewards
            still count in the mean and deviation of their group, and their accuracy in `dynamic`, as with TRL's
            `mask_truncated_completions` [C].
        reward_seconds: longest time that one reward may take for one batch.
        reward_process: rewards of your own run in a helper process, which can crash, hang or be ended without the run;
            false: in the process of the run, where the time limit does not interrupt code in C. The command line takes
            true.
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
    ) -> None:
        super().__init__()
        at_least(
            "rollout", 1, prompts=prompts, completions=completions, max_new_tokens=max_new_tokens
        )
        at_least(
            "rollout",
            1,
            minibatches=minibatches,
            epochs=epochs,
            validation_completions=validation_completions,
        )
        seeds("rollout", seed=seed)
        positive("rollout", reward_seconds=reward_seconds)
        self.rewards = as_rewards(rewards)
        self.reward_seconds, self.reward_process = reward_seconds, reward_process
        self.caller = RewardCaller(self.rewards, reward_seconds, reward_process)
        self.prompts, self.completions = prompts, completions
        self.max_new_tokens = max_new_tokens
        self.minibatches, self.epochs = minibatches, epochs
        self.sampler = sampler or LocalSampler()
        self._seed = seed
        self.validation_completions = validation_completions
        self.replay = replay
        self.parity_gate = parity_gate
        self.dynamic, self.mask_truncated = dynamic, mask_truncated
        self.counter = 0
        """Rollouts finished or under way."""
        self.schedule: Schedule | None = None
        self._data: PromptDataModule | None = None
        self._experience: Experience | None = None
        self._plan: list[list[torch.Tensor]] = []
        self._denominators: list[Denominators] = []
        self._gate_passed = False

    @property
    def seed(self) -> int:
        """Seed of the sampling."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    # --- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        data = prompts_of(trainer)
        if not self.rewards and (stage != "predict" or data.judged):
            raise UserError(
                "`rollout.rewards` is empty: name at least one reward, such as `MathAnswer`"
            )
        if self.dynamic is not None:
            self.dynamic.check(self.rewards, self.completions)
        pl_module.objective.advantage.check(self.completions)
        self.sampler.check(pl_module.objective.surrogate.candidates)
        if self.mask_truncated and pl_module.objective.advantage.weighs_tokens:
            raise UserError(
                f"`rollout.mask_truncated` takes completions away that `{type(pl_module.objective.advantage).__name__}` "
                "counted at its branches; use `mask_truncated: false`"
            )
        for reward in self.rewards:
            reward.check(self.max_new_tokens)
            reward.check_columns(self._columns(data))
        if self.replay is not None:
            self.replay.check(self.completions, pl_module.objective.advantage)
        if stage == "fit":
            self._setup_fit(trainer, pl_module)

    @staticmethod
    def _columns(data: PromptDataModule) -> list[str]:
        """Names of the columns that rewards see besides prompt, target and solution."""
        rows = [*data.splits.train, *data.validation_rows]
        return list(dict.fromkeys(str(name) for row in rows for name in row.extra))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.caller.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.caller.close()

    def _setup_fit(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        if any(
            isinstance(callback, GradientAccumulationScheduler)
            for callback in callbacks_of(trainer)
        ):
            raise UserError(
                "`GradientAccumulationScheduler` changes the number of micro-batches, which is fixed within a rollout; "
                "set `trainer.accumulate_grad_batches` instead"
            )
        # first in each slot
        callbacks_of(trainer).sort(key=lambda callback: callback is not self)
        quick = is_fast_dev_run(trainer)
        if quick:
            trainer.accumulate_grad_batches = 1
            # Lightning 2.6.6 writes last.ckpt nevertheless
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_last = False
        self.schedule = Schedule(
            self.prompts,
            self.completions,
            minibatches=1 if quick else self.minibatches,
            epochs=1 if quick else self.epochs,
            micro_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
        )
        if self.schedule.updates > 1 and module.objective.surrogate.on_policy:
            rank_zero_warn(
                f"`{type(module.objective.surrogate).__name__}` is meant for one update per rollout, and there are "
                f"{self.schedule.updates}: later ones are biased, as nothing weighs what older weights sampled; set "
                "`rollout.minibatches` and `rollout.epochs` to 1, or take a surrogate with ratios"
            )
        fit_limits(trainer, self.schedule)
        self._data = prompts_of(trainer)
        rank_zero_info(f"rollout    {self.schedule.describe()}")
        axes = [
            axis for axis in module.objective.describe().split(" | ") if not axis.endswith(" none")
        ]
        rank_zero_info(
            fill(" | ".join(axes), 80, initial_indent="objective  ", subsequent_indent=" " * 11)
        )

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

    # --- training -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        schedule = self._need_schedule()
        slot = trainer.fit_loop.epoch_loop.batch_idx % schedule.slots
        if slot == 0 or self._experience is None:
            tell_phase(trainer, "gathering weights")
            with pl_module.policy.full_weights():
                self._collect(trainer, pl_module)
        update, micro = divmod(slot, schedule.micro_batches)
        experience = self.experience
        rows = self._plan[update][micro].to(experience.rewards_B.device)
        # after a resume the experience is on the CPU
        batch["micro_batch"] = to_device(take_rows(experience, rows), pl_module.device)
        batch["denominators"] = self._denominators[update]
        batch["last_of_update"] = micro == schedule.micro_batches - 1
        batch["first_update"] = update == 0
        batch["last_of_rollout"] = slot == schedule.slots - 1

    def _collect(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        """Roll out, tell the other callbacks, and log what came of it."""
        module.zero_grad(
            set_to_none=True
        )  # gradients of the last update are otherwise alive during the rollout
        for callback in listeners(trainer):
            callback.on_rollout_start(
                trainer, module, self._need_schedule().rows, self.max_new_tokens
            )
        collector = self.collector(trainer, module)
        due = bool(module.reference_every) and self.counter % module.reference_every == 0
        collected = collector.collect(self.counter, reference=due)
        self._gate_passed = self._gate_passed or self.parity_gate
        self._experience, self._plan = collected.experience, collected.plan
        self._denominators = collected.denominators
        self.counter += 1
        for callback in listeners(trainer):
            callback.on_rollout_end(trainer, module, collected.event)
        module.log_with_update(collected.metrics, progress_bar=("reward/mean", "reward/accuracy"))

    def collector(self, trainer: L.Trainer, module: PolicyOptimization) -> Collector:
        """Return what makes rollouts with the options of this callback."""
        return Collector(
            scorer=module.scorer(),
            objective=module.objective,
            prompts=self._need_data(),
            sampler=self.sampler,
            judge=partial(self.judge, module),
            schedule=self._need_schedule(),
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            ranks=TrainerRanks(trainer, module, self),
            listener=TrainerListener(trainer, module),
            replay=self.replay,
            dynamic=self.dynamic,
            mask_truncated=self.mask_truncated,
            parity_gate=self.parity_gate and not self._gate_passed,
        )

    @property
    def experience(self) -> Experience:
        if self._experience is None:
            raise RuntimeError("there is no rollout yet")
        return self._experience

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"counter": self.counter, "gate_passed": self._gate_passed}
        if self._experience is not None:
            state["experience"] = plain_state(self._experience)
            state["plan"] = self._plan
            state["denominators"] = [
                (part.actions, part.tokens, part.credited) for part in self._denominators
            ]
        return {"ranks": gather_ranks(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks, (rank, world) = state_dict["ranks"], rank_and_world_size()
        if len(ranks) != world:
            raise UserError(
                f"the checkpoint was saved by {len(ranks)} processes and cannot be resumed by {world}"
            )
        state_dict = ranks[rank]
        if not is_count(state_dict["counter"]) or not isinstance(state_dict["gate_passed"], bool):
            raise TypeError(
                "`counter` of RolloutLoop must be a count, and `gate_passed` true or false"
            )
        if state_dict["counter"] and "experience" not in state_dict:
            raise ValueError(
                f"RolloutLoop has made {state_dict['counter']} rollouts, and its state holds none"
            )
        self.counter = state_dict["counter"]
        self._gate_passed = state_dict["gate_passed"]
        if "experience" in state_dict:
            tensors = dict(state_dict["experience"])
            check_state(Experience, tensors)
            check_state(Rollout, tensors["rollout"])
            rollout = Rollout(**tensors.pop("rollout"))
            self._experience = Experience(rollout=rollout, **tensors)
            rows = torch.cat([rows for update in state_dict["plan"] for rows in update])
            if sorted(set(rows.tolist())) != list(range(len(self._experience.rewards_B))):
                raise ValueError("`plan` of RolloutLoop does not name the rows of its experience")
            self._plan = state_dict["plan"]
            self._denominators = [Denominators(*parts) for parts in state_dict["denominators"]]
