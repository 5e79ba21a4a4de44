"""What a callback that rolls out does for the verbs other than `fit`: validation, test and prediction."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.data.base import seeded_generator
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.source import RolloutCallback, RolloutSource, evaluation_progress
from lightning_mpo.rewards.base import Reward, Scores, completions_of, score_all
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rollout.base import Sampler
from lightning_mpo.rollout.evaluation import Decoding, Tally, decodings
from lightning_mpo.supports import FullVocabulary
from lightning_mpo.types import Finish, PromptBatch, Rollout


class RolloutEvaluation(RolloutCallback, RolloutSource):
    """Samples and judges held-out prompts as the rollouts of training are."""

    rewards: list[Reward]
    caller: RewardCaller
    sampler: Sampler
    max_new_tokens: int
    validation_completions: int

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._weights = ExitStack()
        self._reported: set[str] = set()

    @property
    @abstractmethod
    def seed(self) -> int:
        """Seed of the sampling."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tallies = {}
        if isinstance(pl_module, PolicyOptimization):
            self._weights.enter_context(pl_module.policy.gathered())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weights.close()
        for prefix, tally in self._tallies.items():
            if tally.undecided and not trainer.sanity_checking:
                self._tell_undecided(prefix, tally)
            for name, value in tally.compute().items():
                pl_module.log(f"val/{prefix}{name}", value, prog_bar=prefix + name == "pass@1", sync_dist=True)

    def _tell_undecided(self, prefix: str, tally: Tally) -> None:
        if any(reward.is_accuracy for reward in self.rewards):
            sentence = (
                f"{tally.undecided} of {tally.rows} held-out completions belong to prompts that no accuracy reward judged "
                f"in full; `val/{prefix}pass@1` leaves them out"
            )
        else:
            sentence = "no reward says what is right (`is_accuracy`), so that there is no `val/pass@1`"
        if sentence not in self._reported:
            self._reported.add(sentence)
            rank_zero_warn(sentence)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, PolicyOptimization):  # processes may have different numbers of batches
            self._weights.enter_context(pl_module.policy.in_step())

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weights.close()

    def _draw(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int, decoding: Decoding) -> Rollout:
        with module.trainer.precision_plugin.forward_context():
            return self.sampler.sample(
                module.policy,  # type: ignore[arg-type]
                prompts,
                decoding.completions,
                support=decoding.support,
                temperature=module.temperature,
                max_new_tokens=self.max_new_tokens,
                generator=seeded_generator(self.seed, batch_idx, module.trainer.global_rank, 2),
                greedy=decoding.greedy,
                progress=evaluation_progress(module.trainer),
            )

    def judge(self, module: PolicyOptimization, rollout: Rollout) -> Scores:
        """Call the rewards on sampled rows."""
        return score_all(self.rewards, completions_of(rollout, module.policy.tokenizer), self.caller)

    def validate(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> None:
        for prefix, decoding in decodings(module.objective.support, self.validation_completions).items():
            rollout = self._draw(module, prompts, batch_idx, decoding)
            tally = self._tallies.setdefault(prefix, Tally((1,), module.device))
            tally.add(rollout, self.judge(module, rollout), decoding.completions)

    def predict(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        rollout = self._draw(module, prompts, batch_idx, Decoding(FullVocabulary(), self.validation_completions))
        records = [
            {**row.extra, "prompt": row.prompt, "completion": text, "finished": finish == Finish.STOP}
            for row, text, finish in zip(rollout.rows, rollout.texts, rollout.finish_B.tolist(), strict=True)
        ]
        if module.trainer.datamodule.judged:  # type: ignore[attr-defined]
            rewards = self.judge(module, rollout).rewards_B.tolist()
            for record, row, reward in zip(records, rollout.rows, rewards, strict=True):
                record |= {"target": row.target, "reward": reward}
        return records
