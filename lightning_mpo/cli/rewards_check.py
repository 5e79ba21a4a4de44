"""`lightning-mpo rewards-check`: the rewards of a run on right, wrong and hostile answers."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.plan_objects import RewardsCLI, build, without_notes
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.rollout_setup import check_rewards
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.rewards.answers import BEHIND_THOUGHTS, GOLD, KINDS, PLACE, SOLUTION, samples
from lightning_mpo.rewards.base import Reward
from lightning_mpo.rewards.checking import SUM, flags, scores_of
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.program_answers import PROGRAMS, is_program
from lightning_mpo.rewards.trying import Outcome, Trial, choose_golds, right_forms
from lightning_mpo.types import PromptRow

COLUMNS = ("reward", "kind", "rows", "mean", "min", "max", "judged", "right", "failed", "seconds")
WIDTH = 140
"""Columns of the table where there is no terminal."""
MOST_ROWS = 100_000
ENCODED = 20_000
"""Characters of an answer that are encoded. No run has responses of a million tokens."""


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo rewards-check`.

    Returns:
        The exit code: 1 if there are flags, 2 after a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-mpo rewards-check",
        description="Try the rewards of a run on answers of known kinds. Exit code 1 means that "
        "there are flags. No weights are loaded. Other options are those of `fit`.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="rows (default: 20)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="limit for one reward of your own on the answers of one kind (default: 30)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        metavar="X",
        help="largest part of the reward of right answers that others may get (default: 0.5)",
    )
    parser.add_argument(
        "--form",
        metavar="TEXT",
        help=f"form of a right answer, with {PLACE} for the target, such as 'so: {PLACE}'",
    )
    outcome: list[int] = []
    with without_notes():
        failed = guarded(lambda: outcome.append(_check(*parser.parse_known_args(arguments))))
    return failed or outcome[0]


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    """Print table, notes and flags; return the exit code."""
    _check_options(options, rest)
    # rewards and rows of the configuration
    module, data, trainer = build(rest, RewardsCLI)
    rollout = next(part for part in callbacks_of(trainer) if isinstance(part, RolloutLoop))
    if not isinstance(data, PromptDataModule):
        raise UserError(
            f"`rewards-check` needs data of prompts, and `{type(data).__name__}` is no "
            "`PromptDataModule`"
        )
    check_rewards(rollout.rewards, data, "fit", rollout.max_new_tokens)
    rows = list(data.splits.train[: options.rows])
    # the helper process starts before the tokenizer has threads
    rollout.caller.close()
    caller = RewardCaller(rollout.rewards, options.seconds, process=True)
    encode, unit = _encoder(module)
    trial = Trial(rollout.rewards, caller, encode)
    try:
        # the right answers, then all kinds of answers
        forms = trial.forms(rows, options.form)
        names = choose_golds(rows, forms)
        golds = [
            name and right_forms(row, options.form)[name]
            for row, name in zip(rows, names, strict=True)
        ]
        written = samples(rows, golds)
        tried = [trial.outcome(kind, written) for kind in (*KINDS, *PROGRAMS)]
    finally:
        caller.close()
    outcomes = [*forms.values(), *(outcome for outcome in tried if outcome is not None)]
    # print
    count = sum(len(outcome.answers) for outcome in outcomes)
    print(
        f"{len(rows)} rows of {type(data).__name__}, {count} answers of {len(outcomes)} kinds; "
        f"tokens are {unit}"
    )
    _show(outcomes, rollout.rewards)
    for note in _notes(rows, names, outcomes):
        print(f"note  {note}")
    if not any(reward.is_accuracy for reward in rollout.rewards):
        print("note  no reward says what is right (`accuracy: true`); flags compare rewards alone")
    findings = flags(outcomes, options.share)
    for flag in findings:
        print(f"flag  {flag.fault}: {flag.text}")
    print(f"{len(findings)} flags: exit code 1" if findings else "no flags")
    return int(bool(findings))


def _check_options(options: argparse.Namespace, rest: list[str]) -> None:
    """Refuse options out of range."""
    if not rest:
        raise UserError(
            "`rewards-check` needs a configuration: lightning-mpo rewards-check -c quickstart"
        )
    if not 1 <= options.rows <= MOST_ROWS:
        raise UserError(f"`--rows` must be from 1 to {MOST_ROWS:,}, got {options.rows}")
    if not 0 < options.seconds < math.inf:
        raise UserError(f"`--seconds` must be positive and finite, got {options.seconds:g}")
    if not 0 <= options.share < math.inf:
        raise UserError(f"`--share` must be at least 0 and finite, got {options.share:g}")
    if options.form is not None and PLACE not in options.form:
        raise UserError(
            f"`--form` {options.form!r} has no {PLACE}, which stands for the target; write "
            f"'so: {PLACE}', say"
        )


def _encoder(module: Any) -> tuple[Callable[[str, bool], tuple[int, ...]], str]:
    """Return a function from texts to tokens, and the name of the tokens.

    They are words if there is no tokenizer here.
    """
    try:
        tokenizer, end = module.policy.tokenizer, list(module.policy.end_tokens[:1])
    except (AttributeError, UserError):
        return lambda text, finished: tuple(range(len(text[:ENCODED].split()) + finished)), "words"

    def encode(text: str, finished: bool) -> tuple[int, ...]:
        ids = tokenizer(text[:ENCODED], add_special_tokens=False, verbose=False)["input_ids"]
        return (*ids, *(end if finished else ()))

    return encode, f"those of {type(module.policy).__name__}"


def _show(outcomes: Sequence[Outcome], rewards: Sequence[Reward]) -> None:
    """Print a row for each reward and kind; the sum follows if it is no single reward of weight 1."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    is_terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    accuracies = [reward.is_accuracy for reward in rewards]
    is_sum_shown = len(rewards) > 1 or rewards[0].weight != 1
    names = [*outcomes[0].parts, *([SUM] if is_sum_shown else [])]
    for name, accuracy in zip(names, [*accuracies, any(accuracies)], strict=False):
        for outcome in outcomes:
            table.add_row(name, outcome.kind.name, *_cells(outcome, name, accuracy))
        table.add_section()
    Console(width=None if is_terminal else WIDTH, markup=False, highlight=False).print(table)


def _cells(outcome: Outcome, name: str, is_accuracy: bool) -> list[str]:
    """Return the numbers of a reward, or of the sum, on the answers of a kind."""
    scores = scores_of(outcome, name)
    numbers = [score for score in scores if score is not None]
    parts = [outcome.parts[name]] if name != SUM else list(outcome.parts.values())
    right = outcome.right if name == SUM else [s is not None and s > 0.5 for s in scores]
    failed = sum(any(part.errors[i] for part in parts) for i in range(len(scores)))
    means = [f"{f(numbers):.4g}" if numbers else "-" for f in (fmean, min, max)]
    return [
        str(len(scores)),
        *means,
        f"{len(numbers) / len(scores):.0%}",
        f"{sum(value is True for value in right) / len(scores):.0%}" if is_accuracy else "-",
        str(failed),
        f"{sum(part.seconds for part in parts):.2f}",
    ]


def _notes(
    rows: Sequence[PromptRow], names: Sequence[str | None], outcomes: Sequence[Outcome]
) -> list[str]:
    """Return remarks that are no faults of a reward."""
    # the right answers
    counts = Counter(names)
    unknown = counts.pop(None, 0)
    listed = ", ".join(f"{name} ({count} rows)" for name, count in counts.items())
    notes = [f"gold is written in the form: {listed}"] if listed else []
    if unknown:
        notes.append(f"{unknown} rows have no right answer, so no gold")
    wrong = [row for row in rows if row.solution is not None and SOLUTION not in right_forms(row)]
    if wrong and not any(is_program(row) for row in wrong):
        notes.append(f"{len(wrong)} solutions do not give their target, and are not taken as gold")
    if SOLUTION not in counts and any(SOLUTION in right_forms(row) for row in rows):
        notes.append("solutions get less reward than this form")
    # rewards that abstain, and thoughts
    for name in outcomes[0].parts:
        if all(score is None for outcome in outcomes for score in outcome.parts[name].scores):
            notes.append(f"`{name}` judged no answer")
    gold, behind = (
        next((outcome for outcome in outcomes if outcome.kind is kind), None)
        for kind in (GOLD, BEHIND_THOUGHTS)
    )
    if gold and behind and behind.right.count(True) < gold.right.count(True):
        notes.append(
            f"behind thoughts, gold is judged right in {behind.right.count(True)} of "
            f"{len(behind.right)} rows"
        )
    return notes
