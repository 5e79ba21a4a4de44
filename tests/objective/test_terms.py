"""A loss term of one's own: it joins the loss, its denominators, the request and a configuration, and nothing else changes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from types import ModuleType

import pytest
import torch
import yaml
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.objective.action_spaces import ActionSpace, SequenceActions
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.head_policy_loss import HeadPolicyLoss
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.terms import (
    EntropyBonus,
    HeadUpkeep,
    LossBatch,
    LossTerm,
    WeightPenalty,
)
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.scores import Denominators, Metrics, ScoreRequest
from tests.support.builders import scores_of, subclasses
from tests.support.objectives import MASK, experience, table


@dataclass(frozen=True)
class Confidence(LossTerm):
    """Adds the mean probability of the sampled tokens, of which the package knows nothing.

    Args:
        coef: factor.
    """

    coef: float = 0.5

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(entropy_grad=True)

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        probabilities_BT = batch.scores.logprobs_BT.exp()
        total = weighted_sum(probabilities_BT.detach(), batch.weights_BT, 1.0)
        metrics = {"toy/probability": (total, batch.weights_BT.sum())}
        return self.coef * batch.mean(probabilities_BT), metrics

    def check_with(self, axes: Axes) -> None:
        if not axes[ActionSpace].token_level:
            raise UserError("`Confidence` is for tokens")

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"toy/percent": 100 * means["toy/probability"]}


@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()], ids=["tokens", "sequences"])
def test_a_toy_term_joins_the_loss(reduction):
    batch = experience()
    scores = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout)
    plain, with_term = (
        Objective(reduction=reduction),
        Objective(reduction=reduction, terms=[Confidence()]),
    )
    denominators = with_term.denominators(batch)
    base, _ = plain.loss(batch, scores, denominators)
    loss, metrics = with_term.loss(batch, scores, denominators)
    probabilities = scores.logprobs_BT.exp()
    rows = [probabilities[b][MASK[b]] for b in range(len(MASK)) if MASK[b].any()]
    mean = (
        torch.cat(rows).mean()
        if isinstance(reduction, TokenMean)
        else torch.stack([row.mean() for row in rows]).mean()
    )
    torch.testing.assert_close(loss - base, 0.5 * mean, rtol=1e-6, atol=1e-9)
    value, weight = metrics["toy/probability"]
    finished = with_term.finish({"toy/probability": float(value / weight)})
    assert finished["toy/percent"] == pytest.approx(100 * float(torch.cat(rows).mean()), rel=1e-6)


def test_what_a_toy_term_says_of_itself_is_heard():
    objective = Objective(terms=[Confidence()])
    assert objective.request.entropy_grad
    assert "terms Confidence(coef=0.5)" in objective.describe()
    with pytest.raises(UserError, match="`Confidence` is for tokens"):
        Objective(actions=SequenceActions(), terms=[Confidence()])


def test_a_configuration_names_a_toy_term_by_its_module(tmp_path, monkeypatch):
    module = ModuleType("my_terms")
    module.Confidence = Confidence  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_terms", module)
    monkeypatch.setattr(Confidence, "__module__", "my_terms")
    term = {"class_path": "my_terms.Confidence", "init_args": {"coef": 0.25}}
    overlay = {"model": {"init_args": {"objective": {"terms": [term]}}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(overlay))
    objective = Objective.from_file("dapo", tmp_path / "more.yaml")
    assert objective == replace(Objective.from_file("dapo"), terms=(Confidence(0.25),))


TERMS = {
    "nothing": ([], ScoreRequest(), False),
    "entropy": ([EntropyBonus(0.1)], ScoreRequest(entropy_grad=True), True),
    "entropy that is off": ([EntropyBonus(0.0)], ScoreRequest(), False),
    "penalty": ([WeightPenalty()], ScoreRequest(), True),
    "divergence": ([KLPenalty(ConstantCoefficient())], ScoreRequest(), True),
    "divergence in the reward": (
        [KLPenalty(ConstantCoefficient(), "k1", "reward")],
        ScoreRequest(),
        False,
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_says_what_it_needs_and_whether_it_learns_alone(name):
    terms, request, alone = TERMS[name]
    objective = Objective(terms=terms)
    assert objective.request == request
    zero, some = torch.tensor(0.0), torch.tensor(3.0)
    assert objective.nothing_to_learn(Denominators(some, some, zero)) is not alone
    assert objective.nothing_to_learn(Denominators(some, zero, some))
    assert not objective.nothing_to_learn(Denominators(some, some, some))
    assert objective.needs_reference is name.startswith("divergence")


def test_every_term_is_named_above_or_in_a_file_of_its_own():
    assert subclasses(LossTerm) == {
        EntropyBonus,
        HeadPolicyLoss,
        HeadUpkeep,
        KLPenalty,
        ValueLoss,
        WeightPenalty,
    }


def test_the_parser_knows_the_types_of_a_member_in_a_file_of_ones_own(tmp_path, monkeypatch):
    """Postponed annotations are evaluated in that file, which need not import what ours import."""
    (tmp_path / "own_spaces.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from lightning_mpo import BlockActions, Support, TopK\n"
        "@dataclass(frozen=True)\n"
        "class Pairs(BlockActions):\n"
        "    length: int = 2\n"
        "    beside: Support | None = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"class_path": "own_spaces.Pairs", "init_args": {"beside": "TopK"}}
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"objective": {"actions": own}}}})
    )
    actions = Objective.from_file("grpo", tmp_path / "own.yaml").actions
    assert (actions.length, actions.beside) == (2, TopK())


def test_two_terms_of_a_class_are_refused():
    with pytest.raises(
        UserError, match=r"^`objective.terms` has two terms `EntropyBonus`; give one$"
    ):
        Objective(terms=[EntropyBonus(0.1), WeightPenalty(), EntropyBonus(0.2)])


def test_the_default_is_grpo():
    assert Objective() == Objective.from_file("grpo")
    assert Objective().terms == ()


def test_a_later_list_replaces_an_earlier_one(tmp_path):
    (tmp_path / "more.yaml").write_text("model: {init_args: {objective: {terms: [EntropyBonus]}}}")
    (tmp_path / "append.yaml").write_text(
        "model: {init_args: {objective: {terms+: [EntropyBonus]}}}"
    )
    kinds = [type(term) for term in Objective.from_file("mpo", tmp_path / "more.yaml").terms]
    assert kinds == [EntropyBonus]
    kinds = [type(term) for term in Objective.from_file("mpo", tmp_path / "append.yaml").terms]
    assert kinds == [HeadUpkeep, EntropyBonus]


def test_members_cannot_be_changed_but_for_the_state_of_a_controller():
    objective = Objective(terms=[KLPenalty(AdaptiveCoefficient(0.1))])
    for member in (objective, objective.terms[0], objective.surrogate, objective.support):
        name = next((item.name for item in fields(member)), "anything")
        with pytest.raises(AttributeError):
            setattr(member, name, None)
    objective.terms[0].controller.restore(0.7)
    assert objective.terms[0].controller.coefficient == 0.7
