"""Whole updates of MPO against loops over rows, tokens and offsets: scores, advantages, losses and gradients.

The oracle (`whole_updates.py` and `whole_update_losses.py` in `tests/support/`) shares the modules of network, heads and
critic with the package, and no other code. Each case has prompts of three lengths, a response that ends at once, and two
updates at weights that have moved. Each update has two micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.future_credit import FutureCredit
from lightning_mpo.policies.packing import lay_out
from lightning_mpo.rollout.collect import Collected
from lightning_mpo.types import take_rows, trim
from tests.support import whole_rollouts as R
from tests.support import whole_update_losses as O
from tests.support import whole_updates as W
from tests.support.builders import relative_error, subclasses
from tests.support.whole_updates import Case

CASES = {
    # blocks and heads
    "letter": Case(),
    "rows apart": Case(share_prompts=False),
    "lambda 1": Case(lam=1.0, length=2),
    "length 5": Case(length=5, gamma=0.9),
    "actions of three tokens": Case(action=3, kl="reward", gamma=0.95),
    "stride": Case(stride=3),
    "stride, absorb": Case(length=5, stride=5, tail="absorb"),
    "renorm": Case(tail="renorm", lam=1.0),
    "parallel heads": Case(family="parallel"),
    "sequential heads": Case(family="sequential"),
    "detached heads": Case(detached=True),
    "no upkeep": Case(upkeep=0.0),
    "backbone": Case(source="backbone"),
    "backbone, stride": Case(source="backbone", stride=3, share_prompts=False),
    # supports
    "six ids": Case(support="six"),
    "six ids, lambda 1, apart": Case(support="six", lam=1.0, share_prompts=False),
    "six ids, heads over all": Case(support="six", heads_support="full"),
    "up to six ids": Case(support="slots", length=5, stride=5),
    "backbone, six ids": Case(source="backbone", support="six", lam=1.0),
    "gaps": Case(support="gaps"),
    "gaps, state": Case(support="gaps", credit="state", negatives="drop", stride=3),
    "gaps, backbone": Case(support="gaps", source="backbone"),
    "gaps, backbone, sequences": Case(
        support="gaps", source="backbone", stride=3, reduction="sequences"
    ),
    # critics and divergences
    "critic apart": Case(critic="separate", value_clip=None),
    "critic detached": Case(critic="detached", lam=1.0),
    "divergence in the loss": Case(kl="loss", support="six"),
    "divergence in the reward": Case(kl="reward", credit="state", negatives="bound"),
    # advantages of later tokens
    "same": Case(credit="same"),
    "same, drop": Case(credit="same", negatives="drop", stride=3),
    "same, bound": Case(credit="same", negatives="bound", support="six", lam=1.0),
    "outcome": Case(credit="outcome", tail="renorm"),
    "outcome, drop": Case(credit="outcome", negatives="drop", length=2),
    "outcome, bound": Case(credit="outcome", negatives="bound", share_prompts=False),
    "centred": Case(credit="centred", lam=1.0),
    "centred, drop": Case(credit="centred", negatives="drop", support="slots"),
    "centred, bound": Case(credit="centred", negatives="bound", length=5, stride=5),
    "state": Case(credit="state", length=5),
    "state, drop": Case(credit="state", negatives="drop", lam=1.0),
    "state, bound": Case(credit="state", negatives="bound", support="six"),
    # reductions and responses that are cut off
    "sequences": Case(reduction="sequences", stride=3),
    "sequences, state": Case(reduction="sequences", credit="state", negatives="bound"),
    "cut off": Case(mask_truncated=True, credit="centred"),
    "grpo": Case(advantage="group", reduction="sequences"),
    "grpo, state": Case(advantage="group", reduction="sequences", credit="state", support="six"),
}


@dataclass(frozen=True)
class Results:
    """Both sides of a case."""

    case: Case
    collected: Collected
    old: O.Old
    losses: list[tuple[float, float]]  # of each update: of the package and of the oracle
    gradients: list[tuple[dict[str, Tensor], dict[str, Tensor]]]
    watch: O.Watch


@pytest.fixture(scope="module", params=CASES)
def results(request, tiny_policy) -> Results:
    case = CASES[request.param]
    with W.in_float64():
        return run(case, tiny_policy)


def run(case: Case, tiny_policy) -> Results:
    policy, rollout = R.make_policy(case, tiny_policy), R.make_rollout(case.support)
    module, rows = R.make_module(policy, R.make_objective(case)), R.rows_of(rollout, case)
    # at rollout weights
    collected = R.collect(case, module, rollout)
    with torch.no_grad():
        scores = [W.score(case, policy, row) for row in rows]
    reference = None if case.kl is None else [W.reference_logprobs(policy, row) for row in rows]
    old = O.Old(scores, O.estimate(case, rows, scores, reference), reference)
    # updates, at weights that have moved
    R.move(policy, 0.12, seed=3)
    losses, gradients, watch = [], [], O.Watch()
    for number, update in enumerate(collected.plan):
        loss = R.run_update(module, collected, number)
        actual = R.gradients(policy)
        expected = O.loss(case, policy, rows, torch.cat(update).tolist(), old, watch)
        expected.backward()
        losses.append((loss, expected.item()))
        gradients.append((actual, R.gradients(policy)))
    return Results(case, collected, old, losses, gradients, watch)


def padded(lines: list[list], width: int = R.LONGEST) -> Tensor:
    """Return rows of numbers as a tensor, 0 behind their ends."""
    rows = [[float(value) for value in line] + [0.0] * (width - len(line)) for line in lines]
    return torch.tensor(rows, dtype=torch.float64)


def test_the_cases_have_every_rule_and_share_prompts():
    assert subclasses(FutureCredit) == set(R.CREDITS.values())
    rules = {(case.credit, case.negatives) for case in CASES.values()}
    assert len(rules) == 1 + len(R.CREDITS) * 3
    assert {case.family for case in CASES.values()} == set(R.FAMILIES)
    rollout = R.make_rollout(None)
    assert lay_out(rollout, share=True, hidden_size=16).shared


def test_old_logprobs_of_tokens_and_heads(results):
    experience, scores = results.collected.experience, results.old.scores
    exact = {"rtol": 1e-11, "atol": 1e-11}
    expected = padded([row.token for row in scores])
    torch.testing.assert_close(experience.old_logprobs_BT, expected, **exact)
    if results.case.offsets:
        columns = [padded([row.future[n] for row in scores]) for n in range(results.case.offsets)]
        torch.testing.assert_close(experience.old_future_BTM, torch.stack(columns, -1), **exact)
    if results.case.advantage == "gae":
        expected = padded([row.value for row in scores])
        torch.testing.assert_close(experience.values_BT, expected, **exact)


def test_advantages_and_returns(results):
    experience, estimates = results.collected.experience, results.old.estimates
    for actual, expected in (
        (experience.advantages_BT, estimates.advantages),
        (experience.future_advantages_BT, estimates.future),
        (experience.returns_BT, estimates.returns),
    ):
        assert (actual is None) == (expected is None)
        if expected is not None:
            expected = padded(expected)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
            assert expected.std() > 0.1


def test_losses_and_gradients_of_each_update(results):
    for loss, expected in results.losses:
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for actual, expected in results.gradients:
        assert actual.keys() == expected.keys()
        for part, gradient in expected.items():
            assert relative_error(actual[part], gradient) < 1e-6, part
            assert gradient.norm() > 1e-3, part


def test_some_ratios_and_values_are_clipped_and_none_is_at_an_edge(results):
    watch, case = results.watch, results.case
    assert 3 <= watch.clipped < 0.7 * watch.actions
    assert watch.values_clipped > 0 or case.advantage == "group" or case.value_clip is None
    assert min(watch.margins) > 1e-6


def test_updates_have_micro_batches_of_rows_that_need_padding(results):
    plan, experience = results.collected.plan, results.collected.experience
    assert [len(update) for update in plan] == [R.MICRO_BATCHES] * 2
    rows = torch.cat([torch.cat(update) for update in plan])
    assert sorted(rows.tolist()) == list(range(len(R.RESPONSES)))
    parts = [trim(take_rows(experience, rows)).rollout for rows in plan[0] + plan[1]]
    assert not all(part.attention_mask_BL.all() for part in parts)
