"""Validation, test and prediction by the callback that makes rollouts."""

from __future__ import annotations

import os
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.errors import UserError
from lightning_mpo.metrics import ProblemResults
from lightning_mpo.modules.hooks import RolloutCallback, evaluation_progress, listeners
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.parallel import gather_ranks, rank_and_world_size
from lightning_mpo.modules.reward_reference import connect_rewards
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.trainer import prompts_of
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.token_ids import ids_containing
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.base import Reward, RewardError
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.scoring import (
    Scores,
    answers_of,
    completions_of,
    score_all,
    unjudged,
)
from lightning_mpo.rollout.evaluation import Decoding, Problem, decodings, problem_results
from lightning_mpo.sampling.base import Sampler, SamplingRequest
from lightning_mpo.sampling.reveal_order import reveal_orders
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Finish, PromptBatch, Rollout


class RolloutEvaluation(RolloutCallback, RolloutSource):
    """Samples and judges held-out prompts as the rollouts of training are."""

    rewards: list[Reward]
    caller: RewardCaller
    sampler: Sampler
    max_new_tokens: int
    stop: list[int | str]
    validation_completions: int
    validation_ks: list[int]

    def __init__(self) -> None:
        self._results: dict[str, ProblemResults] = {}
        """Results of the present validation, by the prefix of their metrics."""
        self._problems: dict[str, list[Problem]] = {}
        self._weights = ExitStack()
        self._reported: set[str] = set()
        self._failure: UserError | None = None

    @property
    @abstractmethod
    def seed(self) -> int:
        """Seed of the sampling."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.caller.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.caller.close()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._results, self._problems = {}, {}
        if isinstance(pl_module, PolicyOptimization):
            for prefix in decodings(pl_module.objective.support, self.validation_completions):
                self._results[prefix] = ProblemResults(self.validation_ks).to(pl_module.device)
                self._problems[prefix] = []
            self._weights.enter_context(pl_module.policy.full_weights())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weights.close()
        self._end_failed(trainer, pl_module)
        if not isinstance(pl_module, PolicyOptimization) or not all(self._problems.values()):
            return
        for prefix, results in self._results.items():
            undecided, rows = results.undecided()
            if undecided and not trainer.sanity_checking:
                self._tell_undecided(prefix, undecided, rows)
            for name, (value, low, high) in results.results().items():
                shown = {name: value}
                if "_at_" in name:
                    shown |= {f"{name}_low": low, f"{name}_high": high}
                for key, number in shown.items():
                    bar = prefix + key == "pass_at_1"
                    pl_module.log(f"val/{prefix}{key}", number, prog_bar=bar, sync_dist=True)
        for callback in listeners(trainer):
            callback.on_held_out_end(trainer, pl_module, self, self._problems)

    def _tell_undecided(self, prefix: str, undecided: int, rows: int) -> None:
        if any(reward.is_accuracy for reward in self.rewards):
            sentence = (
                f"{undecided} of {rows} held-out completions belong to prompts that "
                f"no accuracy reward judged in full; `val/{prefix}pass_at_1` leaves them out"
            )
        else:
            sentence = (
                "no reward says what is right (`is_accuracy`), so that there is no `val/pass_at_1`"
            )
        if sentence not in self._reported:
            self._reported.add(sentence)
            rank_zero_warn(sentence)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(
            pl_module, PolicyOptimization
        ):  # processes may have different numbers of batches
            self._weights.enter_context(pl_module.policy.lockstep())

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weights.close()
        self._end_failed(trainer, pl_module)

    def _draw(
        self, module: PolicyOptimization, prompts: PromptBatch, decoding: Decoding
    ) -> Rollout:
        with module.trainer.precision_plugin.forward_context():
            return self.sampler.sample(
                module.policy,
                prompts,
                decoding.completions,
                SamplingRequest(
                    decoding.support,
                    module.temperature,
                    self.max_new_tokens,
                    decoding.greedy,
                    stop=self.stop_ids(module.policy),
                ),
                generator=generator_of(self.seed, Stream.EVALUATE, prompts.first),
                progress=evaluation_progress(module.trainer),
            )

    def stop_ids(self, policy: Policy) -> tuple[int, ...]:
        """Return the ids that end a response besides the policy's end tokens.

        Args:
            policy: its weights need not be loaded.

        Raises:
            UserError: a text of `stop` is not that of one token.
        """
        if not self.stop:
            return ()
        return tuple(ids_containing("rollout.stop", self.stop, policy.token_texts))

    def judge(self, module: PolicyOptimization, rollout: Rollout) -> Scores:
        """Call the rewards on sampled rows.

        Where they fail on one of several processes, its rows are not judged until `end_failed` ends
        all of them: the others would wait in an all-reduce for a process that is gone.
        """
        connect_rewards(self.rewards, module)
        if self._failure is None:
            try:
                return score_all(
                    self.rewards, completions_of(rollout, module.policy.tokenizer), self.caller
                )
            except UserError as error:
                if rank_and_world_size()[1] == 1:
                    raise
                self._failure = error
        return unjudged(self.rewards, len(rollout.rows))

    def judge_problems(
        self, module: PolicyOptimization, rollout: Rollout, completions: int, first: int
    ) -> list[dict[str, Any]]:
        """Call the rewards on all completions of some problems, and return the results by problem.

        Args:
            module: its tokenizer decodes the prompts.
            rollout: the completions.
            completions: number of completions per problem.
            first: number of the first problem.
        """
        scores, answers = self.judge(module, rollout), None
        if self._failure is None:
            answers = answers_of(self.rewards, completions_of(rollout, module.policy.tokenizer))
        return problem_results(rollout, scores, completions, first, answers)

    @property
    def failures(self) -> float:
        """1 if a reward has failed on this process, else 0; `end_failed` takes the sum."""
        return float(self._failure is not None)

    def end_failed(self, failures: float) -> None:
        """End this process where rewards failed on some; all of them call it together.

        Args:
            failures: processes on which they failed.

        Raises:
            RewardError: on every process, with the words of the first one that failed.
        """
        if not failures:
            return
        mine = {
            "error": None if self._failure is None else str(self._failure),
            "process": os.getpid(),
        }
        states = gather_ranks(mine)
        rank = next(rank for rank, state in enumerate(states) if state["error"] is not None)
        error = RewardError(f"{states[rank]['error']} (in process {rank} of {len(states)})")
        error.everywhere = True
        error.launcher = next(
            (state["process"] for state in states if state["process"] == os.getppid()), None
        )
        self._failure = None
        raise error from None

    def _end_failed(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if rank_and_world_size()[1] > 1:
            failures = torch.tensor(self.failures, device=module.device)
            self.end_failed(float(trainer.strategy.reduce(failures, reduce_op="sum")))

    def validate(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> None:
        if self._failure is not None:
            return
        for prefix, decoding in decodings(
            module.objective.support, self.validation_completions
        ).items():
            rollout = self._draw(module, prompts, decoding)
            problems = self.judge_problems(module, rollout, decoding.completions, prompts.first)
            self._results[prefix].update(problems)
            self._problems[prefix] += problems

    def predict(
        self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int
    ) -> list[dict[str, Any]]:
        rollout = self._draw(
            module, prompts, Decoding(FullVocabulary(), self.validation_completions)
        )
        # a record per completion
        records = [
            {
                **row.extra,
                "prompt": row.prompt,
                "completion": text,
                "finished": finish == Finish.STOP,
            }
            for row, text, finish in zip(
                rollout.rows, rollout.texts, rollout.finish_B.tolist(), strict=True
            )
        ]
        # steps of a sampler that reveals tokens in any order
        if rollout.reveal_BT is not None:
            orders = reveal_orders(module.policy.tokenizer, rollout)
            records = [record | order for record, order in zip(records, orders, strict=True)]
        # targets and rewards
        if prompts_of(module.trainer).judged:
            rewards = self.judge(module, rollout).rewards_B.tolist()
            if self._failure is not None:
                return []
            for record, row, reward in zip(records, rollout.rows, rewards, strict=True):
                record |= {"target": row.target, "reward": reward}
        return records
