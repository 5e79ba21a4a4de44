"""`lightning-mpo evaluate`: benchmarks of an exported folder, another model or a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.cli.benchmarks import Benchmark, answer_problems, read_benchmark
from lightning_mpo.cli.export import no_config, read_run, sampling_of
from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.harness import check_harness, named_tasks, run_harness
from lightning_mpo.cli.predict import number_of, read_usage
from lightning_mpo.cli.suggestions import suggest
from lightning_mpo.errors import UserError
from lightning_mpo.modules.rollout_setup import check_ks, check_support
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.checksums import fingerprint
from lightning_mpo.rollout.answer_file import (
    AnswerFile,
    Problems,
    Sampled,
    check_comparable,
    describe,
    read_answers,
)
from lightning_mpo.rollout.evaluation import (
    Decoding,
    results_of,
    short_columns,
    with_intervals,
)
from lightning_mpo.rollout.stages_table import print_difference, print_groups, print_stages
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.storage import read_checkpoint, write_text

EXAMPLE = "lightning-mpo evaluate --model FOLDER --benchmarks gsm8k svamp humaneval"


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo evaluate`; return the exit code, 2 after a mistake."""
    parser = _parser()

    def action() -> None:
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.checkpoint:
            known = [name for option in parser._actions for name in option.option_strings]
            name = rest[0].partition("=")[0]
            raise UserError(f"`evaluate` has no option `{name}`{suggest(name, known)}")
        _check(options)
        _evaluate(options, rest)

    return guarded(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mpo evaluate",
        description="Answer the problems of benchmarks and print accuracies with intervals. An "
        "evaluation that was ended goes on where it stopped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # the model
    add("--model", metavar="FOLDER", help="an exported folder, or another model as `policy.source`")
    add("--base", metavar="SOURCE", help="base model of adapters, in place of the folder's")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights of --model, instead of the folder's (default of other models: "
        "float32)",
    )
    add("-c", "--config", action="append", metavar="FILE", help="configuration of --checkpoint")
    add("--checkpoint", type=Path, metavar="FILE", help="a Lightning checkpoint of a run")
    # the problems
    add("--benchmarks", nargs="+", default=[], metavar="NAME", help="recipes of data, or files")
    add("--limit", type=int, metavar="N", help="the first N problems of each (default: all)")
    add("--split", default="validation", choices=("validation", "train"), help="rows to answer")
    add("--plain", action="store_true", help="prompts are text: no chat template is applied")
    # sampling
    add("--completions", type=int, default=1, metavar="N", help="per problem (default: 1)")
    add("--greedy", action="store_true", help="take the most probable tokens")
    add("--temperature", type=float, metavar="T")
    add("--max_new_tokens", type=int, metavar="N")
    add("--seed", type=int, metavar="N")
    add("--batch_size", type=int, default=32, metavar="N", help="problems at a time (default: 32)")
    add("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    # results
    add("--k", nargs="+", type=int, metavar="K", help="of pass@k and maj@k (default: 1 and N)")
    add("--by", nargs="+", metavar="COLUMN", help="tables by these columns (default: level, type)")
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder of the answers")
    add("--against", type=Path, metavar="DIR", help="folder of an earlier evaluation to subtract")
    add("--other-model", action="store_true", help="--against may be of another architecture")
    add(
        "--harness",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-evaluation-harness, or their files",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or are out of range."""
    if bool(options.model) == bool(options.checkpoint):
        raise UserError(f"`evaluate` needs --model or --checkpoint, one of them: {EXAMPLE}")
    if options.dtype and not options.model:
        raise UserError(
            "`--dtype` belongs to --model; a run has `policy.dtype` in its configuration"
        )
    if not options.benchmarks and not options.harness:
        raise UserError(f"`evaluate` needs --benchmarks: {EXAMPLE}")
    names = [Path(name).stem for name in options.benchmarks]
    if len(set(names)) < len(names):
        raise UserError(f"`--benchmarks` has two of one name: {', '.join(names)}")
    for name in ("limit", "completions", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"`--{name}` must be at least 1, got {value}")
    if options.greedy and options.completions > 1:
        raise UserError("`--greedy` gives equal completions: leave out --completions")
    if options.greedy and options.temperature is not None:
        raise UserError("`--greedy` has no temperature: leave out --temperature")
    options.k = options.k or sorted({1, options.completions})
    check_ks("--k", options.k, options.completions)
    if options.against is not None and options.against.resolve() == options.out.resolve():
        raise UserError("`--against` is the folder of `--out`: name two folders")
    if options.harness:
        check_harness()
        named_tasks(options.harness)  # refuses files that are none


@dataclass(frozen=True)
class Model:
    """The evaluated model.

    Args:
        name: as the command line names it.
        policy: its weights are not loaded.
        sampler: draws answers.
        sampled: settings of the sampling.
    """

    name: str
    policy: Policy
    sampler: Sampler
    sampled: Sampled
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of the description of an evaluation."""


def _model(options: argparse.Namespace, rest: Sequence[str]) -> Model:
    """Return the model, with the options of its folder or run; the command line wins."""
    support = FullVocabulary()
    if options.model:
        folder = Path(options.model).expanduser()
        usage = read_usage(folder, options.model)
        name = str(folder) if folder.is_dir() else options.model
        policy = usage.policy(name, options.base)
        sampler: Sampler | None = usage.sampler()
        defaults = (usage.temperature, usage.max_new_tokens, usage.seed)
        more = dict[str, Any]()
    else:
        name = str(options.checkpoint)
        stored = read_checkpoint(options.checkpoint, "`--checkpoint`", part="outline")
        configs = options.config or no_config("evaluate", options.checkpoint)
        cli, policy = read_run("evaluate", configs, options.checkpoint, rest)
        run = sampling_of(cli)
        sampler, more = run.sampler, {"step": stored.get("global_step")}
        support = support if run.support is None else run.support.fixed
        check_support(policy, support)
        defaults = (run.temperature, run.max_new_tokens, 0)
    values = [
        number_of(options, option, default)
        for option, default in zip(("temperature", "max_new_tokens", "seed"), defaults, strict=True)
    ]
    decoding = Decoding(support, options.completions, options.greedy)
    sampled = Sampled(decoding, *values)
    return Model(name, policy, sampler or LocalSampler(), sampled, more)


def _evaluate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate on all benchmarks, print the tables and write them."""
    benchmarks = [
        read_benchmark(name, options.limit, options.plain, options.split)
        for name in options.benchmarks
    ]
    model = _model(options, rest)
    policy, sampled = model.policy, model.sampled
    # mistakes end the evaluation before the weights are loaded
    policy.check()
    model.sampler.check_policy(policy)
    model.sampler.check_canvas(sampled.max_new_tokens)
    files = []
    split: dict[str, Any] = {"split": "train"} if options.split == "train" else {}
    for benchmark in benchmarks:
        benchmark.connect(policy, model.name, sampled.max_new_tokens)
        about = describe(
            benchmark.name,
            policy,
            benchmark.data,
            benchmark.rows,
            benchmark.loop.rewards,
            sampled,
            model=model.name,
            batch_size=options.batch_size,
            **(split | model.more),
        )
        files.append(AnswerFile(options.out / f"{benchmark.name}.jsonl", about))
        files[-1].resume(options.batch_size)
    columns = [_columns(benchmark, options.by) for benchmark in benchmarks]
    unknown = set(options.by or ()) - {name for names in columns for name in names or ()}
    if unknown:
        raise UserError(f"`--by {min(unknown)}`: no benchmark has this column with short values")
    earlier = [_earlier(file, options) for file in files]
    # weights, and their fingerprint in each file
    if options.dtype:  # behind the checks, which refuse to train 16 bits
        policy.dtype = getattr(torch, options.dtype)
    policy.build(device=_device(options.accelerator), reference=False)
    weights = fingerprint(policy)
    answers: dict[str, Problems] = {}
    for benchmark, file in zip(benchmarks, files, strict=True):
        file = AnswerFile(file.path, {**file.about, "weights": weights})
        try:
            answers[file.path.stem] = answer_problems(
                benchmark, policy, model.sampler, sampled, file, options.batch_size
            )
        finally:
            benchmark.loop.caller.close()
    harness = run_harness(policy, options.harness, options.limit, not options.plain)
    _report(options, model, answers, earlier, columns, harness)


def _columns(benchmark: Benchmark, names: Sequence[str] | None) -> list[str] | None:
    """Return those columns of `--by` that a benchmark has; None: the usual ones."""
    if names is None:
        return None
    known = {name for row in benchmark.rows for name in short_columns(row.extra)}
    return [name for name in names if name in known]


def _earlier(file: AnswerFile, options: argparse.Namespace) -> Problems | None:
    """Return the answers of `--against` to the problems of a file; None: it is not given."""
    if options.against is None:
        return None
    path = options.against / file.path.name
    about, problems = read_answers(path)
    check_comparable(file.about, about, path, options.other_model)
    return problems


def _report(
    options: argparse.Namespace,
    model: Model,
    answers: dict[str, Problems],
    earlier: Sequence[Problems | None],
    columns: Sequence[list[str] | None],
    harness: dict[str, dict[str, Any]],
) -> None:
    """Print tables and differences, and write `summary.json`."""
    kind = "greedy" if options.greedy else f"temperature {model.sampled.temperature:g}"
    results = {
        name: with_intervals(results_of(problems, options.k)) for name, problems in answers.items()
    }
    stages = {f"{name} ({len(answers[name])})": stage for name, stage in results.items()}
    if stages:
        print_stages(stages, f"{model.name}, {kind}, 95 % intervals over problems")
    for (name, problems), names in zip(answers.items(), columns, strict=True):
        print_groups(problems, options.k, names, name)
    summary: dict[str, Any] = {"model": model.name, "benchmarks": results, "harness": harness}
    for (name, problems), before in zip(answers.items(), earlier, strict=True):
        if before is not None:
            change = print_difference(name, problems, before, options.k)
            results[name]["difference"] = with_intervals(change)
    if harness:
        print_stages(harness, "lm-evaluation-harness, with its standard errors")
    write_text(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"answers and summary.json are in {options.out}")


def _device(accelerator: str) -> torch.device:
    """Return the device of the weights."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "cuda" and not has_gpu:
        raise UserError("`--accelerator cuda`: there is no GPU here; leave the option out")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")
