"""Decoding settings of an evaluation, and its results by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k3
from lightning_mpo.metrics import ProblemResults
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.noised import replay_steps
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.types import Finish, Rollout

GROUPS = ("level", "difficulty", "type", "subject")
"""Columns by which tables are made, in any case of letters."""
Problem = Mapping[str, Any]
"""The results of a problem, as `problem_results` returns them."""
LONGEST_VALUE = 60
"""Characters of a text that may name a group."""


@dataclass(frozen=True)
class Decoding:
    """How an evaluation samples.

    Args:
        support: token ids that each step may sample.
        completions: number of completions per prompt.
        greedy: take the most probable token instead of a sample.
    """

    support: Support
    completions: int
    greedy: bool = False


def decodings(support: Support, completions: int) -> dict[str, Decoding]:
    """Return the decodings of an evaluation by the prefix of their metrics.

    One samples from the full vocabulary, or from the part that a fixed support allows. If the
    training support is truncated, another samples from it: training over a support does not change
    the tail of the distribution (docs/algorithms.md 2.5).
    """
    by_prefix = {"": Decoding(support.fixed, completions)}
    if not isinstance(support, FullVocabulary):
        by_prefix["support_"] = Decoding(support, completions)
    return by_prefix


def divergence_of(scorer: Scorer, rollout: Rollout) -> tuple[float, int]:
    """Return the k3 divergence from the reference, in nats, summed over tokens; and their number.

    A masked policy scores tokens in the states in which the sampler revealed them.

    Args:
        scorer: scores with policy and reference.
        rollout: sampled responses.
    """
    mask_BT = rollout.response_mask_BT
    if scorer.policy.masked:
        rollout = replay_steps(rollout)
        mask_BT = mask_BT & rollout.response_mask_BT
    reference_BT = scorer.score(rollout, reference=True).logprobs_BT
    divergence_BT = k3(scorer.score(rollout).logprobs_BT, reference_BT)
    return divergence_BT[mask_BT].sum().item(), int(mask_BT.sum())


def readable(name: str) -> str:
    """Return the name of a metric as tables print it.

    Example:
        >>> readable("support_pass_at_1")
        'support pass@1'
    """
    return name.replace("pass_at_", "pass@").replace("maj_at_", "maj@").replace("_", " ")


def problem_results(
    rollout: Rollout,
    scores: Scores,
    completions: int,
    first: int,
    answers: Sequence[str | None] | None = None,
) -> list[dict[str, Any]]:
    """Return what happened to each problem of a batch, as plain values for JSON.

    Args:
        rollout: all completions of the problems.
        scores: their judgements.
        completions: number of completions per problem.
        first: number of the first problem.
        answers: answer of each completion as text; None: not known.
    """
    lengths = rollout.response_mask_BT.sum(1).tolist()
    truncated = (rollout.finish_B == Finish.LENGTH).tolist()
    decided, right = scores.decided_B.tolist(), scores.correct_B.tolist()
    judged, answered = scores.judged_B.tolist(), scores.answered_B.tolist()
    rewards = scores.rewards_B.tolist()
    by_reward = {name: scores_B.tolist() for name, scores_B in scores.by_reward.items()}
    samples = [
        {
            "completion": text,
            "right": right[b] if decided[b] else None,
            **({} if answers is None else {"answer": answers[b]}),
            "answered": answered[b],
            "reward": rewards[b] if judged[b] else None,
            "length": lengths[b],
            "truncated": truncated[b],
            **({"scores": _scores(by_reward, b)} if len(by_reward) > 1 else {}),
        }
        for b, text in enumerate(rollout.texts)
    ]
    return [
        {
            "problem": first + start // completions,
            "prompt": rollout.rows[start].prompt,
            "target": rollout.rows[start].target,
            "columns": short_columns(rollout.rows[start].extra),
            "samples": samples[start : start + completions],
        }
        for start in range(0, len(samples), completions)
    ]


def _scores(by_reward: Mapping[str, Sequence[float]], b: int) -> dict[str, float | None]:
    """Return the unweighted score of a completion by reward; None: not judged."""
    values = {name: scores[b] for name, scores in by_reward.items()}
    return {name: None if value != value else value for name, value in values.items()}


def short_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that may name a level or a type: numbers and short texts.

    Example:
        >>> short_columns({"level": 5, "type": "Algebra", "test": "assert " * 99})
        {'level': 5, 'type': 'Algebra'}
    """
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, bool | int | float)
        or (isinstance(value, str) and len(value) <= LONGEST_VALUE)
    }


def by_group(
    problems: Sequence[Problem], columns: Sequence[str] | None = None
) -> dict[str, dict[str, list[Problem]]]:
    """Return the problems by column, and within it by value.

    Args:
        problems: as `problem_results` returns them.
        columns: names of columns; None: those of `GROUPS` that the problems have.

    Raises:
        UserError: no problem has such a column.
    """
    known = {name: None for problem in problems for name in problem["columns"]}
    if columns is None:
        columns = [name for name in known if name.casefold() in GROUPS]
    for name in columns:
        if name not in known:
            raise UserError(
                f"no problem has a column {name!r} with short values; there are "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
    groups: dict[str, dict[str, list[Problem]]] = {name: {} for name in columns}
    for name, by_value in groups.items():
        for problem in problems:
            by_value.setdefault(str(problem["columns"].get(name)), []).append(problem)
        groups[name] = dict(sorted(by_value.items()))
    return groups


def with_intervals(results: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return results by name, each followed by its interval under `{name}_interval`.

    Example:
        >>> with_intervals({"pass_at_1": [0.5, 0.4, 0.6]})
        {'pass_at_1': 0.5, 'pass_at_1_interval': [0.4, 0.6]}
    """
    return {
        key: value
        for name, (mean, low, high) in results.items()
        for key, value in ((name, mean), (f"{name}_interval", [low, high]))
    }


def gathered(problems: Sequence[Problem], ks: Sequence[int]) -> ProblemResults:
    """Return the metric of problems that are all on this process."""
    results = ProblemResults(ks, sync_on_compute=False)
    results.update(problems)
    return results


def results_of(problems: Sequence[Problem], ks: Sequence[int]) -> dict[str, list[float]]:
    """Return mean, lower and upper end of each result by name."""
    return gathered(problems, ks).results()
