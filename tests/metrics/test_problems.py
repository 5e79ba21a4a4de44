"""`ProblemResults` against its definition, over batches and processes."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.metrics import ProblemResults, paired


def problem(number, right, answers=None, **more):
    """Return a problem; `right` holds True, False or None (undecided) for each completion."""
    samples = [
        {
            "right": value,
            "answered": value is not None,
            "reward": None if value is None else float(value) + 1,
            "length": 10 + position,
            "truncated": position == 1,
        }
        | ({} if answers is None else {"answer": answers[position]})
        for position, value in enumerate(right)
    ]
    return {"problem": number, "samples": [sample | more for sample in samples]}


def measured(problems, ks=(1,), **options):
    metric = ProblemResults(ks, **options)
    metric.update(problems)
    return metric


def means(metric):
    return {name: result[0] for name, result in metric.results().items()}


def test_results_are_means_over_problems():
    metric = measured(
        [problem(0, [True, False]), problem(1, [False, False]), problem(2, [None, True])], (1, 2)
    )
    assert means(metric) == pytest.approx(
        {
            "pass_at_1": 0.25,  # of the two problems that are decided in full
            "pass_at_2": 0.5,
            "reward": (1.5 + 1 + 2) / 3,  # of the judged completions of each problem
            "answered": 1.0,
            "judged": 5 / 6,
            "length": 10.5,
            "truncated": 0.5,
        }
    )
    assert metric.undecided() == (2, 6)
    values = metric.values()
    assert values["problem"].tolist() == [0, 1, 2]
    assert values["pass_at_1"].isnan().tolist() == [False, False, True]
    for mean, low, high in metric.results().values():
        assert low <= mean <= high


def test_a_majority_votes_by_answers():
    right = [True, False, False, False]
    votes = measured([problem(0, right, ["4", "5", "5", None], truncated=False)], (1, 3, 4))
    # of the four draws of three: 4 5 5 | 4 5 - twice, a tie | 5 5 -
    assert means(votes)["maj_at_3"] == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)
    assert means(votes)["maj_at_4"] == 0
    assert "maj_at_1" not in means(votes)
    # answers that are right are one answer, however they are written
    same = measured([problem(0, [True, True, False], ["1/2", "0.5", "3"])], (3,))
    assert means(same)["maj_at_3"] == 1
    # a response that was cut off has no vote
    cut = measured([problem(0, [True, False, False], ["4", "5", "5"])], (3,))
    assert means(cut)["maj_at_3"] == 0.5
    assert not any(name.startswith("maj") for name in means(measured([problem(0, right)], (4,))))


def test_without_an_accuracy_there_is_no_pass_at_k():
    metric = measured([problem(0, [None, None])], (1, 2))
    assert means(metric) == {"judged": 0, "length": 10.5, "truncated": 0.5}
    assert measured([]).results() == {}


def test_neither_batches_nor_their_order_matter():
    problems = [problem(n, [n % 2 == 0, n % 3 == 0, False]) for n in range(7)]
    whole = measured(problems, (1, 3))
    parts = ProblemResults((1, 3))
    for part in (problems[5:], problems[2:5], problems[:2]):
        parts.update(part)
    assert parts.results() == whole.results()
    parts.reset()
    parts.update(problems[:1])
    assert means(parts) != means(whole)


def test_problems_of_several_processes_count_once():
    """Two ranks, played by a gather that returns this rank's state and that of another."""
    problems = [problem(n, [n < 2, n == 3]) for n in range(5)]
    theirs = measured([*problems[3:], problems[0]])  # a sampler pads with the first batch
    metric = ProblemResults(
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda mine, group: [mine, torch.cat(theirs.samples)],
    )
    metric.update(problems[:3])
    assert metric.results() == measured(problems).results()
    assert len(metric.values()["problem"]) == 3, "the state is this process's again"


def test_differences_are_paired():
    before = measured(
        [problem(0, [False, False]), problem(1, [True, False]), problem(2, [None] * 2)]
    )
    after = measured([problem(2, [True] * 2), problem(1, [True, True]), problem(0, [False, True])])
    change = paired(before, after)
    unseen = 1.959964**2 / (2 + 1.959964**2)  # both problems gain one half
    expected = [0.5, 0.5 - 1.5 * unseen, 0.5 + 0.5 * unseen]
    assert change["pass_at_1"] == pytest.approx(expected, abs=1e-6)
    assert change["length"] == [0, 0, 0]
    assert change["judged"][0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="the same problems"):
        paired(before, measured([problem(0, [True, True])]))


def test_errors():
    with pytest.raises(ValueError, match="`ks` must be numbers of at least 1"):
        ProblemResults([0])
    with pytest.raises(ValueError, match="at least k = 3 completions each, got 2"):
        measured([problem(0, [True, False])], (3,))
    with pytest.raises(ValueError, match="all problems must have 3 completions"):
        measured([problem(0, [True, False]), problem(1, [True] * 3)]).values()
    assert math.isnan(measured([problem(0, [None])]).values()["reward"].item())
