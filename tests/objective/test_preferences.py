"""DPO as an objective: its loss, its denominators, what it refuses, and runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.objective.action_spaces import Actions, SequenceActions, TokenActions
from lightning_mpo.objective.advantages import GroupRelative, ReturnToGo
from lightning_mpo.objective.corrections import TruncatedWeights
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.preferences import PairwiseLogistic, Preferences
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.selection import HighEntropyTokens
from lightning_mpo.objective.surrogates import PolicyGradient
from lightning_mpo.scores import Denominators
from lightning_mpo.types import Experience, take_rows
from tests.support.builders import scores_of
from tests.support.objectives import MASK, B, experience, table
from tests.support.runs import Probe, fit, make_objective

G = 4
REWARDS = torch.tensor([0.2, 0.9, 0.5, 0.2, 1.0, 0.3, 0.0, 0.7], dtype=torch.float64)
BETA = 0.4
kinds = pytest.mark.parametrize("pairs", ["extremes", "all"])


def dpo(pairs: str = "extremes", **axes) -> Objective:
    chosen = {
        "actions": SequenceActions(mean=False),
        "advantage": Preferences(pairs),
        "surrogate": PairwiseLogistic(BETA),
        "reduction": SequenceMean(),
    }
    return make_objective(**chosen | axes)


def judged(objective: Objective, rewards: torch.Tensor = REWARDS) -> Experience:
    """Return two groups of responses with the advantages of the objective; one response is empty."""
    batch = experience()
    valid = MASK.any(1)
    outcome = Outcome(at_last_token(rewards, MASK), MASK, G, valid, sums_B=rewards)
    estimate = objective.advantage.estimate(outcome)
    weights_BT = batch.token_weights_BT
    if estimate.weights_BT is not None:
        weights_BT = weights_BT * estimate.weights_BT
    rollout = replace(batch.rollout, group_B=torch.arange(B) // G)
    return replace(
        batch,
        rollout=rollout,
        valid_B=valid,
        advantages_BT=estimate.advantages_BT,
        token_weights_BT=weights_BT,
    )


def loss_and_gradient(
    objective: Objective, batch: Experience, parts, denominators: Denominators | None = None
):
    """Return the loss and its gradient with respect to a table of logits, over micro-batches."""
    leaf = table().requires_grad_()
    total = denominators or objective.denominators(batch)
    loss = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        part = take_rows(batch, torch.tensor(rows))
        scores = scores_of(leaf[rows], part.rollout.responses_BT, part.mask_BT, part.rollout)
        loss = loss + objective.loss(part, scores, total)[0]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def responses(batch: Experience) -> torch.Tensor:
    """Return the log-ratio of each response against the reference, with gradient."""
    leaf = table().requires_grad_()
    scores = scores_of(leaf, batch.rollout.responses_BT, MASK, batch.rollout)
    return leaf, ((scores.logprobs_BT - batch.reference_logprobs_BT) * MASK).sum(1)


@kinds
def test_the_loss_is_a_loop_over_pairs(pairs):
    objective = dpo(pairs)
    batch = judged(objective)
    leaf, d = responses(batch)
    valid, means, rows = MASK.any(1), [], []
    for p in range(B // G):
        own = [b for b in range(p * G, p * G + G) if valid[b]]
        wins = [(i, j) for i in own for j in own if REWARDS[i] > REWARDS[j]]
        if pairs == "extremes":
            wins = [(max(own, key=lambda b: REWARDS[b]), min(own, key=lambda b: REWARDS[b]))]
        losses = [-torch.nn.functional.logsigmoid(BETA * (d[i] - d[j])) for i, j in wins]
        means.append(sum(losses) / len(losses))
        rows.append(len({row for pair in wins for row in pair}))
    expected = sum(mean * count for mean, count in zip(means, rows, strict=True)) / sum(rows)
    gradient = torch.autograd.grad(expected, leaf)[0]
    loss, actual = loss_and_gradient(objective, batch, [range(B)])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(actual, gradient)
    assert actual.abs().sum() > 0.1


@kinds
def test_parts_of_whole_groups_add_up_over_micro_batches_and_ranks(pairs):
    objective = dpo(pairs)
    batch = judged(objective)
    whole = loss_and_gradient(objective, batch, [range(B)])
    ranks = [range(G), range(G, B)]
    total = sum(
        (objective.denominators(take_rows(batch, torch.tensor(rows))) for rows in ranks[1:]),
        start=objective.denominators(take_rows(batch, torch.tensor(ranks[0]))),
    )
    for actual, expected in zip(
        loss_and_gradient(objective, batch, ranks, total), whole, strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_at_the_reference_it_is_the_policy_gradient_of_the_pairs():
    """Apart from the factor β/2."""
    objective = dpo()
    batch = judged(objective)
    scores = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout)
    batch = replace(batch, reference_logprobs_BT=scores.logprobs_BT)
    plain = replace(objective, surrogate=PolicyGradient())
    _, gradient = loss_and_gradient(objective, batch, [range(B)])
    _, expected = loss_and_gradient(plain, batch, [range(B)])
    torch.testing.assert_close(gradient, BETA * expected)


@kinds
def test_equal_rewards_leave_nothing_to_learn(pairs):
    objective = dpo(pairs)
    batch = judged(objective, torch.full((B,), 0.1, dtype=torch.float64))
    denominators = objective.denominators(batch)
    assert objective.nothing_to_learn(denominators)
    loss, gradient = loss_and_gradient(objective, batch, [range(B)])
    assert loss == 0
    assert not gradient.any()
    assert not objective.nothing_to_learn(objective.denominators(judged(objective)))


def test_margin_and_accuracy_are_over_pairs():
    objective = dpo()
    batch = judged(objective)
    _, d = responses(batch)
    scores = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout)
    metrics = objective.loss(batch, scores, objective.denominators(batch))[1]
    margins = [BETA * (d[1] - d[0]).item(), BETA * (d[4] - d[5]).item()]
    assert REWARDS[[1, 0, 4, 5]].tolist() == [0.9, 0.2, 1.0, 0.3]
    total, count = metrics["pairs/margin"]
    assert count == 2
    assert (total / count).item() == pytest.approx(sum(margins) / 2)
    assert metrics["pairs/accuracy"][0] == sum(margin > 0 for margin in margins)


REFUSED = {
    "tokens": ({"actions": TokenActions()}, "compares log-probs of whole responses; use `actions:"),
    "means": ({"actions": SequenceActions()}, "compares log-probs of whole responses"),
    "no group": (
        {"advantage": ReturnToGo()},
        "compares the completions of a prompt, and `ReturnToGo` does not; use `advantage: Preferences`",
    ),
    "a token mean": (
        {"reduction": TokenMean()},
        "takes the mean over pairs of whole responses; use `reduction: SequenceMean`, not `TokenMean`",
    ),
    "chosen tokens": (
        {"selection": HighEntropyTokens()},
        "takes the mean over pairs of whole responses; use `selection: AllTokens`",
    ),
    "a correction": (
        {"correction": TruncatedWeights("sequence")},
        "takes log-probs of a causal policy against its reference, without `TruncatedWeights`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_beside_pairs_is_refused(name):
    axes, message = REFUSED[name]
    with pytest.raises(UserError, match="^`PairwiseLogistic` ") as refusal:
        dpo(**axes)
    assert message in str(refusal.value)


def test_options_out_of_range_and_a_missing_reference_are_refused():
    with pytest.raises(UserError, match="`PairwiseLogistic.beta` must be positive, got 0"):
        PairwiseLogistic(0)
    with pytest.raises(UserError, match="`Preferences.pairs` must be 'extremes' or 'all'"):
        Preferences("best")  # type: ignore[arg-type]
    objective = dpo()
    batch = replace(judged(objective), reference_logprobs_BT=None)
    with pytest.raises(RuntimeError, match="the reference has scored"):
        loss_and_gradient(objective, batch, [range(B)])
    one = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="needs the log-probs of the reference"):
        PairwiseLogistic().loss(Actions(one, one, one.bool(), one))


def test_it_trains_through_several_updates_of_whole_groups(tmp_path):
    """The reference scores each rollout; the first update on a rollout has a ratio of 1."""
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    run = fit(
        tmp_path,
        objective=dpo(advantage=GroupRelative()),
        rollout={"prompts": 4, "completions": 4, "minibatches": 2},
        callbacks=[probe],
        accumulate_grad_batches=2,
    )
    assert run.record.column("pairs/margin")[1] > 0  # the first update has moved the policy
    for batch in seen:
        groups = batch.rollout.group_B.tolist()
        assert all(groups.count(group) == 4 for group in groups)
    assert run.record.column("ratio/mean")[0] == pytest.approx(1.0, abs=1e-4)
    assert run.record.column("pairs/margin")[0] == pytest.approx(0.0, abs=1e-4)
    assert run.record.column("loss/surrogate")[0] == pytest.approx(math.log(2), abs=1e-4)
