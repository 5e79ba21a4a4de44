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
from lightning_mpo.functional.divergences import k3
from lightning_mpo.modules.hooks import RolloutCallback, evaluation_progress, tell_phase
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run, prompts_of
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.rollout.evaluation import Decoding, Tally, decodings
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.rollout.learning_curve import draw_learning_curve
from lightning_mpo.rollout.stages_table import print_stages
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Rollout


class Report(RolloutCallback):
    """Evaluates held-out problems before the first and after the last update.

    Both evaluations use the same problems, decoding and seeds.

    Writes `summary.json`, `completions/<stage>.jsonl` and `learning_curve.png` into the run folder
    and prints a table; under `fast_dev_run` the table alone.
    Its `kl` is from the reference of that moment: the policy as the run began, or what
    `ReferenceUpdate` last made of it.

    Args:
        problems: held-out problems, the first ones of the validation split.
        completions: per problem; pass@1 and the unbiased pass@`completions` come from them.
        initial: what the stage before training is called.
        batch_size: sequences that are sampled together.
    """

    def __init__(
        self,
        problems: int = 200,
        completions: int = 8,
        initial: str = "initial",
        batch_size: int = 512,
    ) -> None:
        at_least("Report", 1, problems=problems, completions=completions, batch_size=batch_size)
        if batch_size < completions:
            raise UserError(
                "`Report` needs at least 1 problem, 1 completion and a `batch_size` that holds a "
                f"problem's completions, got {problems}, {completions} and {batch_size}"
            )
        self.problems, self.completions = problems, completions
        self.initial, self.batch_size = initial, batch_size
        self.stages: dict[str, dict[str, Any]] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self._clipped = [0.0, 0]
        self._started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, PolicyOptimization):
            pl_module.keep_reference = True

    # --- during the run ----------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.initial not in self.stages and isinstance(pl_module, PolicyOptimization):
            self._evaluate(trainer, pl_module, self.initial)
        self._started = time.perf_counter()

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
            self._clipped[0] += float(trainer.callback_metrics.get("ratio/clip_fraction", 0.0))
            self._clipped[1] += 1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get("val/pass_at_1")
        if value is not None and not trainer.sanity_checking:
            self.curve.append({"step": trainer.global_step, "validation": float(value)})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        self.seconds["training"] = (
            self.seconds.get("training", 0.0) + time.perf_counter() - self._started
        )
        self._evaluate(trainer, pl_module, "final")
        self.stages["final"]["clip_fraction"] = self._clipped[0] / max(self._clipped[1], 1)
        self._write(trainer)

    # --- evaluation --------------------------------------------------------------------------

    def _evaluate(self, trainer: L.Trainer, module: PolicyOptimization, stage: str) -> None:
        started = time.perf_counter()
        sampled = decodings(module.objective.support, self.completions)
        ways = {"": sampled.pop(""), "greedy_": Decoding(FullVocabulary(), 1, True)} | sampled
        result: dict[str, Any] = {}
        with module.policy.full_weights():
            for prefix, decoding in ways.items():
                result |= self._decode(trainer, module, stage, prefix, decoding)
        self.stages[stage] = result
        self.seconds[f"evaluation_{stage}"] = time.perf_counter() - started

    def _decode(
        self,
        trainer: L.Trainer,
        module: PolicyOptimization,
        stage: str,
        prefix: str,
        decoding: Decoding,
    ) -> dict[str, Any]:
        data, source = prompts_of(trainer), _rollout_of(trainer)
        rows = data.splits.validation[: self.problems]
        size = max(1, self.batch_size // decoding.completions)
        tally = Tally(
            (1,) if decoding.completions == 1 else (1, decoding.completions), module.device
        )
        divergence, tokens, records = 0.0, 0, []
        for start in range(0, len(rows), size):
            tell_phase(trainer, "evaluation")
            draws = generator_of(source.seed, Stream.REPORT, start)
            with trainer.precision_plugin.forward_context():
                rollout = source.sampler.sample(
                    module.policy,
                    data.encode(rows[start : start + size]),
                    decoding.completions,
                    SamplingRequest(
                        decoding.support, module.temperature, source.max_new_tokens, decoding.greedy
                    ),
                    generator=draws,
                    progress=evaluation_progress(trainer),
                )
            scores = source.judge(module, rollout)
            tally.add(rollout, scores, decoding.completions)
            if not prefix and start == 0:
                divergence, tokens = self._divergence(module, rollout)
                records = _records(rollout, scores.rewards_B.tolist(), decoding.completions)
        if records and trainer.is_global_zero and not is_fast_dev_run(trainer):
            _write_lines(_folder(trainer) / "completions" / f"{stage}.jsonl", records)
        values = tally.compute()
        result: dict[str, Any] = {}
        for k, metric in tally.passes.items():
            if f"pass_at_{k}" not in values:  # no accuracy reward judged anything
                continue
            name = "accuracy" if decoding.greedy else f"pass_at_{k}"
            result[f"{prefix}{name}"] = values[f"pass_at_{k}"]
            result[f"{prefix}{name}_interval"] = [float(bound) for bound in metric.interval(0.95)]
        if tally.undecided:
            result[f"{prefix}undecided"] = tally.undecided / tally.rows
        if not decoding.greedy:
            result[f"{prefix}length"] = values["length"]
            result[f"{prefix}truncated"] = values["truncated"]
        if tokens:
            result["kl"] = divergence / tokens
        return result

    @staticmethod
    def _divergence(module: PolicyOptimization, rollout: Rollout) -> tuple[float, int]:
        """Return the k3 divergence from the reference summed over tokens, nats, and the tokens."""
        reference_BT = module.score(rollout, reference=True).logprobs_BT
        divergence_BT = k3(module.score(rollout).logprobs_BT, reference_BT)
        return divergence_BT[rollout.response_mask_BT].sum().item(), int(
            rollout.response_mask_BT.sum()
        )

    # --- results -----------------------------------------------------------------------------

    @rank_zero_only
    def _write(self, trainer: L.Trainer) -> None:
        problems = min(self.problems, len(prompts_of(trainer).splits.validation))
        print_stages(self.stages, problems)
        if is_fast_dev_run(trainer):
            return
        folder = _folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        unit = 1024 if sys.platform != "darwin" else 1024**2
        summary = self.stages | {
            "seconds": self.seconds,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            "problems": problems,
            "updates": trainer.global_step,
            "curve": self.curve,
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
            "clipped": self._clipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stages, self.curve = state_dict["stages"], state_dict["curve"]
        self.seconds, self._clipped = state_dict["seconds"], state_dict["clipped"]


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir)


def _rollout_of(trainer: L.Trainer) -> RolloutLoop:
    for callback in callbacks_of(trainer):
        if isinstance(callback, RolloutLoop):
            return callback
    raise UserError("`Report` needs the `RolloutLoop` callback, whose sampler and rewards it uses")


def _records(rollout: Rollout, rewards: list[float], completions: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": rollout.rows[i].prompt,
            "completion": rollout.texts[i],
            "target": rollout.rows[i].target,
            "reward": rewards[i],
        }
        for i in range(0, len(rewards), completions)
    ]


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
