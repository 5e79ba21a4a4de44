"""Results of a stage of a run, and the paired difference of two stages, by the names of a summary."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.metrics import paired
from lightning_mpo.rollout.answer_file import check_comparable, read_answers
from lightning_mpo.rollout.evaluation import Decoding, Problem, gathered, with_intervals


def metrics_of(problems: Sequence[Problem], prefix: str, decoding: Decoding) -> dict[str, Any]:
    """Return the results of a decoding with intervals, and the share of undecided completions.

    Args:
        problems: results of all problems.
        prefix: of the names.
        decoding: by which they were sampled.
    """
    results = gathered(problems, sorted({1, decoding.completions}))
    metrics = with_intervals(_named(results.results(), prefix, decoding))
    undecided, rows = results.undecided()
    return metrics | ({f"{prefix}undecided": undecided / rows} if undecided else {})


def change_of(folder: Path, initial: str, decodings: Mapping[str, Decoding]) -> dict[str, Any]:
    """Return final - initial by name over the same problems, with intervals, from files of answers.

    Args:
        folder: holds `<prefix><stage>.jsonl`.
        initial: name of the first stage.
        decodings: of the stages, by prefix.
    """
    change: dict[str, Any] = {}
    for prefix, decoding in decodings.items():
        paths = [folder / f"{prefix}{stage}.jsonl" for stage in (initial, "final")]
        try:
            (first, before), (last, after) = map(read_answers, paths)
            check_comparable(last, first, paths[0])
        except UserError as error:  # removed, or sampled otherwise before a resume
            warnings.warn(f"no difference of {prefix}{initial} and final: {error}", stacklevel=2)
            continue
        ks = sorted({1, decoding.completions})
        values = paired(gathered(before, ks), gathered(after, ks))
        change |= with_intervals(_named(values, prefix, decoding))
    return change


def _named(
    values: dict[str, list[float]], prefix: str, decoding: Decoding
) -> dict[str, list[float]]:
    """Return results under the names of the summary; of greedy completions the accuracy alone."""
    if decoding.greedy:
        values = {"accuracy": values["pass_at_1"]} if "pass_at_1" in values else {}
    return {f"{prefix}{name}": value for name, value in values.items()}
