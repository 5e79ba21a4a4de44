"""Benchmarks: data and rewards of a recipe or a file, checked and sampled problem by problem."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.settings import PARSER_OPTIONS
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.fitting import check_fit
from lightning_mpo.modules.rollout_setup import check_rewards
from lightning_mpo.policies.base import Policy
from lightning_mpo.recipes import expand, find, read, with_includes
from lightning_mpo.rewards.scoring import answers_of, completions_of, score_all
from lightning_mpo.rollout.answer_file import AnswerFile, Problems, Sampled
from lightning_mpo.rollout.evaluation import problem_results
from lightning_mpo.sampling.base import Sampler, SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow

SECTIONS = ("data", "rollout", "include")
"""Sections of a benchmark's file."""


@dataclass(frozen=True)
class Benchmark:
    """Problems and the rewards that judge answers to them.

    Args:
        name: of its recipe or file, without folder and ending.
        data: renders the problems.
        loop: holds the rewards, and the process that calls those of a user.
        limit: number of problems, the first ones; None: all.
        split: "validation": the rows of published figures; "train": those to train on.
    """

    name: str
    data: PromptDataModule
    loop: RolloutLoop
    limit: int | None = None
    split: str = "validation"

    @property
    def rows(self) -> Sequence[PromptRow]:
        """The problems."""
        train = self.split == "train"
        return (self.data.splits.train if train else self.data.benchmark_rows)[: self.limit]

    def connect(self, policy: Policy, model: str, max_new_tokens: int) -> None:
        """Render all problems, before the weights are loaded.

        Args:
            policy: its tokenizer renders.
            model: its name, for messages.
            max_new_tokens: longest response.

        Raises:
            UserError: there is no reward or no chat template, or a problem does not fit the model.
        """
        self.data.prepare_data()
        check_rewards(self.loop.rewards, self.data, "test", max_new_tokens)
        if self.data.chat_template and not policy.tokenizer.chat_template:
            raise UserError(
                f"{model!r} has no chat template, and the benchmark {self.name!r} writes its "
                "prompts as chats: export the model with its template, or add --plain for prompts "
                "as text"
            )
        self.data.connect(policy.tokenizer)
        check_fit(policy, self.data, self.rows, max_new_tokens, "--max_new_tokens")


def read_benchmark(
    name: str, limit: int | None, plain: bool, split: str = "validation"
) -> Benchmark:
    """Return the benchmark of a recipe, such as `gsm8k`, or of a file with `data` and `rollout`.

    Args:
        name: of the recipe, or a path.
        limit: number of problems; None: all.
        plain: prompts are text instead of chats.
        split: rows that are the problems, "validation" or "train".

    Raises:
        UserError: there is no such recipe, or it is no benchmark.
    """
    # sections of its files
    files = with_includes(find(name, place="`--benchmarks`: "))
    sections = {section for file in files for section in read(file)}
    other = sorted(sections - set(SECTIONS))
    if other or not {"data", "rollout"} <= sections:
        reason = f"has the section `{other[0]}`" if other else "lacks `data` or `rollout.rewards`"
        raise UserError(
            f"`--benchmarks` {name!r} is no benchmark: it {reason}; name a recipe of data, such as "
            "`gsm8k`, or a file with `data` and `rollout.rewards`"
        )
    # data and rewards
    parser = LightningArgumentParser(**PARSER_OPTIONS, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_lightning_class_args(RolloutLoop, "rollout")
    parser.set_defaults({"rollout.reward_process": True})
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    parser.add_argument("--include", type=list[str] | str | None)
    options = parser.parse_args(expand(["-c", name]))
    if plain:
        _write_as_text(options.data)
    for option in ("config", "include"):
        options.pop(option, None)
    parts = parser.instantiate_classes(options)
    if not isinstance(parts.data, PromptDataModule):
        raise UserError(f"`--benchmarks` {name!r} has no data of prompts")
    return Benchmark(Path(name).stem, parts.data, parts.rollout, limit, split)


def _write_as_text(data: Namespace) -> None:
    """Turn the chat template off in the options of data, or of those that they are made of."""
    arguments = data.get("init_args") or Namespace()
    if "chat_template" in arguments:
        arguments.chat_template = False
    for part in (arguments.get("base"), *(arguments.get("others") or ())):
        if isinstance(part, Namespace):
            _write_as_text(part)


def answer_problems(
    benchmark: Benchmark,
    policy: Policy,
    sampler: Sampler,
    sampled: Sampled,
    file: AnswerFile,
    batch_size: int,
) -> Problems:
    """Sample and judge answers to all problems, and return the results.

    A batch that the file holds already is not sampled again. The random numbers of a batch depend
    on the seed and its first problem alone, so an evaluation that goes on ends with the same table.

    Args:
        benchmark: problems and rewards.
        policy: with its weights.
        sampler: draws the answers.
        sampled: settings of the sampling.
        file: takes the results.
        batch_size: problems that are sampled together.
    """
    rows, decoding, started = benchmark.rows, sampled.decoding, time.monotonic()
    problems = file.resume(batch_size)
    if len(problems) == len(rows):
        if not file.path.exists():
            file.write(problems)
        print(f"{benchmark.name:10} all {len(rows)} problems were answered before")
        return problems
    if problems:
        print(f"{benchmark.name:10} goes on behind {len(problems)} of {len(rows)} problems")
    file.begin(problems)
    request = SamplingRequest(
        decoding.support,
        sampled.temperature,
        sampled.max_new_tokens,
        decoding.greedy,
        stop=benchmark.loop.stop_ids(policy),
    )
    for start in range(len(problems), len(rows), batch_size):
        # prompts -> completions -> judgements -> file
        prompts = benchmark.data.encode(rows[start : start + batch_size])
        generator = generator_of(sampled.seed, Stream.EVALUATE, start)
        rollout = sampler.sample(
            policy, prompts, decoding.completions, request, generator=generator
        )
        completions: Any = completions_of(rollout, policy.tokenizer)
        rewards = benchmark.loop.rewards
        scores = score_all(rewards, completions, benchmark.loop.caller)
        answers = answers_of(rewards, completions)
        results = problem_results(rollout, scores, decoding.completions, start, answers)
        file.add(results)
        problems += results
        seconds = time.monotonic() - started
        print(
            f"{benchmark.name:10} {len(problems)} of {len(rows)} problems, {seconds:.0f} s",
            flush=True,
        )
    file.finish()
    return problems
