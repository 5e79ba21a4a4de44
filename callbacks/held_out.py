"""Writes the answers to held-out problems, prints tables, and compares them with step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.metrics import paired
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.parallel import gather_ranks
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.trainer import is_fast_dev_run, prompts_of
from lightning_mpo.rollout.answer_file import (
    AnswerFile,
    Sampled,
    check_comparable,
    describe,
    read_answers,
)
from lightning_mpo.rollout.evaluation import (
    Problem,
    by_group,
    decodings,
    gathered,
    results_of,
    short_columns,
    with_intervals,
)
from lightning_mpo.rollout.stages_table import print_difference, print_groups, print_stages


class HeldOutAnswers(RolloutCallback):
    """Writes the answers to all held-out problems of each validation, as JSON lines.

    The files are `held_out/step-<updates>.jsonl` of `fit`, and `held_out/validate.jsonl` and
    `test.jsonl` of these verbs, which also print tables. A file has its name only if it is whole.
    With several processes, process 0 writes the problems of all of them, each once.

    During `fit` it logs `val/pass_at_1_gain`: the paired difference from the first validation of
    the run, with its interval. That is step 0 with `trainer.num_sanity_val_steps: -1`. `validate` and
    `test` print the difference from it.

    Args:
        columns: columns of the data for further tables; None: those named `level`, `difficulty`,
            `type` or `subject`.
    """

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self.columns = columns
        self._first: dict[str, tuple[dict[str, Any], list[Problem]]] = {}
        """Description and problems of the first validation, by the prefix of their metrics."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = {}
        if trainer.ckpt_path is None and trainer.is_global_zero and not is_fast_dev_run(trainer):
            for path in _folder(trainer).glob("*step-*.jsonl"):  # of an earlier run
                path.unlink()
        trainer.strategy.barrier()

    def on_held_out_end(
        self,
        trainer: L.Trainer,
        module: PolicyOptimization,
        source: RolloutSource,
        problems: Mapping[str, Sequence[Problem]],
    ) -> None:
        # those of all processes, each once and in order
        assert isinstance(source, RolloutLoop)
        states = gather_ranks(dict(problems))
        data = prompts_of(trainer)
        for prefix, decoding in decodings(
            module.objective.support, source.validation_completions
        ).items():
            every = {part["problem"]: part for state in states for part in state[prefix]}
            # a limit on batches may leave problems out
            ordered: list[Problem] = [
                {**every[n], "problem": i} for i, n in enumerate(sorted(every))
            ]
            rows = [data.validation_rows[number] for number in sorted(every)]
            if trainer.sanity_checking and len(rows) < len(data.validation_rows):
                continue
            # the file, tables and the difference from the first validation
            sampled = Sampled(decoding, module.temperature, source.max_new_tokens, source.seed)
            about = describe(
                *(type(data).__name__, module.policy, data, rows, source.rewards, sampled),
                step=trainer.global_step if trainer.state.fn == "fit" else None,
            )
            self._write(trainer, prefix, about, ordered)
            if trainer.state.fn == "fit":
                self._log_gain(trainer, module, prefix, about, ordered)
            elif trainer.is_global_zero:
                self._print(trainer, prefix, about, ordered, source.validation_ks)

    def _write(
        self, trainer: L.Trainer, prefix: str, about: dict[str, Any], problems: list[Problem]
    ) -> None:
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        verb = str(trainer.state.fn.value) if trainer.state.fn else "validate"
        name = f"step-{trainer.global_step:06d}" if verb == "fit" else verb
        AnswerFile(_folder(trainer) / f"{prefix}{name}.jsonl", about).write(problems)

    def _log_gain(
        self,
        trainer: L.Trainer,
        module: PolicyOptimization,
        prefix: str,
        about: dict[str, Any],
        problems: list[Problem],
    ) -> None:
        if prefix not in self._first:
            # process 0 has the files, and all must take the same
            earlier = self._earlier(trainer, prefix) if trainer.is_global_zero else None
            self._first[prefix] = trainer.strategy.broadcast(earlier) or (about, problems)
        first, before = self._first[prefix]
        if first["step"] == about["step"]:
            return
        try:
            check_comparable(about, first, "the first validation of the run")
        except UserError as error:  # options of the validation changed before a resume
            rank_zero_warn(f"no `val/{prefix}pass_at_1_gain`: {error}")
            return
        gain = paired(gathered(before, [1]), gathered(problems, [1])).get("pass_at_1")
        names = ("pass_at_1_gain", "pass_at_1_gain_low", "pass_at_1_gain_high")
        for name, value in zip(names, gain or (), strict=False):
            module.log(f"val/{prefix}{name}", value, sync_dist=True)

    def _earlier(
        self, trainer: L.Trainer, prefix: str
    ) -> tuple[dict[str, Any], list[Problem]] | None:
        """Return the first validation of the run from its file; None: there is none."""
        paths = sorted(_folder(trainer).glob(f"{prefix}step-*.jsonl"))
        if not paths:
            return None
        try:
            about, problems = read_answers(paths[0])
        except UserError as error:
            rank_zero_warn(f"{error}; gains are not from it")
            return None
        return about, list(problems)

    def _print(
        self,
        trainer: L.Trainer,
        prefix: str,
        about: dict[str, Any],
        problems: list[Problem],
        ks: Sequence[int],
    ) -> None:
        name = f"{about['benchmark']}{', training support' if prefix else ''}"
        title = f"{name}, {len(problems)} problems, 95 % intervals"
        print_stages({"": with_intervals(results_of(problems, ks))}, title)
        print_groups(problems, ks, self.columns, name)
        earlier = self._earlier(trainer, prefix)
        if earlier is None:
            return
        try:
            check_comparable(about, earlier[0], f"step {earlier[0]['step']} of the run")
        except UserError as error:
            rank_zero_warn(f"not compared with the first validation: {error}")
            return
        print_difference(f"{name}, step {earlier[0]['step']}", problems, earlier[1], ks)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.columns is not None:
            rows = prompts_of(trainer).validation_rows
            by_group([{"columns": short_columns(row.extra)} for row in rows], self.columns)


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "held_out"
