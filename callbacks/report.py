"""Evaluates before and after training in the same way, and writes the run's summary."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback, evaluation_progress, tell_phase
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run, prompts_of
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.rollout.answer_file import AnswerFile, Sampled, describe
from lightning_mpo.rollout.evaluation import Decoding, Problem, decodings, divergence_of
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.rollout.learning_curve import draw_learning_curve
from lightning_mpo.rollout.stage_results import change_of, metrics_of
from lightning_mpo.rollout.stages_table import print_stages
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.seeding import Stream, generator_of

VALIDATION = {
    "validation": "pass_at_1",
    "validation_reward": "reward",
    "support_validation": "support_pass_at_1",
    "support_validation_reward": "support_reward",
}
"""Keys of a point of the curve, each with the validation metric that it holds."""


class Report(RolloutCallback):
    """Evaluates held-out problems before the first and after the last update.

    Both evaluations use the same problems, decoding and seeds.

    Prints a table with the paired difference, and writes `summary.json`, `learning_curve.png` and
    the answers to all problems, `completions/<stage>.jsonl`, into the run folder. Under
    `fast_dev_run` it only prints the table.
    The `kl` of a stage is from the reference at that time: the initial policy, or the policy of the
    last `ReferenceUpdate`.

    Args:
        problems: held-out problems, the first ones of the validation split.
        completions: sampled per problem, for pass@1 and the unbiased pass@`completions`.
        initial: name of the stage before training.
        batch_size: sequences that are sampled together.
        support: a support for additional evaluations of a run over the full vocabulary. They
            compare it with runs that are trained over a support. A training support takes its place.
    """

    def __init__(
        self,
        problems: int = 200,
        completions: int = 8,
        initial: str = "initial",
        batch_size: int = 512,
        support: Support | None = None,
    ) -> None:
        at_least("Report", 1, problems=problems, completions=completions, batch_size=batch_size)
        if batch_size < completions:
            raise UserError(
                "`Report` needs at least 1 problem, 1 completion and a `batch_size` that holds a "
                f"problem's completions, got {problems}, {completions} and {batch_size}"
            )
        self.problems, self.completions = problems, completions
        self.initial, self.batch_size, self.support = initial, batch_size, support
        self.stages: dict[str, dict[str, Any]] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self._clip_fractions = [0.0, 0]
        """The sum of the clip fractions of all updates, and the number of updates."""
        self._training_started = self._validation_started = 0.0
        self._decodings: dict[str, Decoding] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, PolicyOptimization):
            pl_module.keep_reference = True

    # --- during the run ----------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.initial not in self.stages and isinstance(pl_module, PolicyOptimization):
            self._evaluate(trainer, pl_module, self.initial)
        self._training_started = time.perf_counter()

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        rollout = event.experience.rollout
        self.curve.append(
            {
                "step": trainer.global_step,
                "accuracy": event.accuracy,
                "reward": event.scores.rewards_B.mean().item(),
                "length": rollout.response_mask_BT.sum(1).float().mean().item(),
            }
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch.get("last_of_update"):
            clip_fraction = trainer.callback_metrics.get("ratio/clip_fraction", 0.0)
            self._clip_fractions[0] += float(clip_fraction)
            self._clip_fractions[1] += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # pass@1 and mean reward, also over the training support
        point = {
            key: float(trainer.callback_metrics[f"val/{name}"])
            for key, name in VALIDATION.items()
            if f"val/{name}" in trainer.callback_metrics
        }
        if point and not trainer.sanity_checking:
            self.curve.append({"step": trainer.global_step} | point)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            seconds = time.perf_counter() - self._validation_started
            self.seconds["validation"] = self.seconds.get("validation", 0.0) + seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        self.seconds["training"] = (
            self.seconds.get("training", 0.0) + time.perf_counter() - self._training_started
        )
        self._evaluate(trainer, pl_module, "final")
        clip_sum, updates = self._clip_fractions
        self.stages["final"]["clip_fraction"] = clip_sum / max(updates, 1)
        self._write(trainer)

    # --- evaluation --------------------------------------------------------------------------

    def _evaluate(self, trainer: L.Trainer, module: PolicyOptimization, stage: str) -> None:
        started = time.perf_counter()
        support = module.objective.support
        if isinstance(support, FullVocabulary) and self.support is not None:
            support = self.support
        sampling = decodings(support, self.completions)
        self._decodings = {
            "": sampling.pop(""),
            "greedy_": Decoding(FullVocabulary(), 1, True),
        } | sampling
        metrics: dict[str, Any] = {}
        with module.policy.full_weights():
            for prefix, decoding in self._decodings.items():
                metrics |= self._decode(trainer, module, stage, prefix, decoding)
        self.stages[stage] = metrics
        self.seconds[f"evaluation_{stage}"] = time.perf_counter() - started

    def _decode(
        self,
        trainer: L.Trainer,
        module: PolicyOptimization,
        stage: str,
        prefix: str,
        decoding: Decoding,
    ) -> dict[str, Any]:
        """Sample, judge and save completions of all problems; return metrics by prefixed name."""
        data, loop = prompts_of(trainer), _rollout_of(trainer)
        rows = data.splits.validation[: self.problems]
        size = max(1, self.batch_size // decoding.completions)
        divergence, tokens = 0.0, 0
        problems: list[Problem] = []
        for start in range(0, len(rows), size):
            # prompts -> completions, with the same random numbers at each stage
            tell_phase(trainer, "evaluation")
            generator = generator_of(loop.seed, Stream.REPORT, start)
            with trainer.precision_plugin.forward_context():
                rollout = loop.sampler.sample(
                    module.policy,
                    data.encode(rows[start : start + size]),
                    decoding.completions,
                    SamplingRequest(
                        decoding.support,
                        module.temperature,
                        loop.max_new_tokens,
                        decoding.greedy,
                        stop=loop.stop_ids(module.policy),
                    ),
                    generator=generator,
                    progress=evaluation_progress(trainer),
                )
            # rewards; divergence of the first batch without a prefix
            problems += loop.judge_problems(module, rollout, decoding.completions, start)
            if not prefix and start == 0:
                divergence, tokens = divergence_of(module.scorer(), rollout)
        # results of all problems, and a file of them
        sampled = Sampled(decoding, module.temperature, loop.max_new_tokens, loop.seed)
        if trainer.is_global_zero and not is_fast_dev_run(trainer):
            about = describe(
                *(type(data).__name__, module.policy, data, rows, loop.rewards, sampled),
                step=trainer.global_step,
            )
            path = _folder(trainer) / "completions" / f"{prefix}{stage}.jsonl"
            AnswerFile(path, about).write(problems)
        metrics = metrics_of(problems, prefix, decoding)
        if tokens:
            metrics["kl"] = divergence / tokens
        return metrics

    # --- results -----------------------------------------------------------------------------

    @rank_zero_only
    def _write(self, trainer: L.Trainer) -> None:
        problems = min(self.problems, len(prompts_of(trainer).splits.validation))
        folder, quick = _folder(trainer), is_fast_dev_run(trainer)
        change = {} if quick else change_of(folder / "completions", self.initial, self._decodings)
        title = f"{problems} held-out problems, 95 % intervals, paired difference"
        print_stages(self.stages | ({"difference": change} if change else {}), title)
        if quick:
            return
        folder.mkdir(parents=True, exist_ok=True)
        unit = 1024 if sys.platform != "darwin" else 1024**2
        summary = self.stages | {
            "seconds": self.seconds,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            "problems": problems,
            "updates": trainer.global_step,
            "curve": self.curve,
            "difference": change,
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        draw_learning_curve(
            self.curve, self.stages, folder / "learning_curve.png", updates=trainer.global_step
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "stages": self.stages,
            "curve": self.curve,
            "seconds": self.seconds,
            "clipped": self._clip_fractions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stages, self.curve = state_dict["stages"], state_dict["curve"]
        self.seconds, self._clip_fractions = state_dict["seconds"], state_dict["clipped"]


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir)


def _rollout_of(trainer: L.Trainer) -> RolloutLoop:
    for callback in callbacks_of(trainer):
        if isinstance(callback, RolloutLoop):
            return callback
    raise UserError("`Report` needs the `RolloutLoop` callback, whose sampler and rewards it uses")
