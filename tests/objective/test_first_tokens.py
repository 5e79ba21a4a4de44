"""`FirstTokens`: the first token of a response is one of a few."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.first_tokens import FirstTokens
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.objective.token_ids import ids_containing
from lightning_mpo.policies.scoring import ResponseTokens
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.events import _support_sums
from lightning_mpo.sampling.drawing import Step
from tests.support.builders import make_rollout
from tests.support.runs import make_objective

TEXTS = ["<pad>", "<end>", "a", "#", "\n", "#\n", "b"]


def texts() -> list[str]:
    return TEXTS


def test_texts_become_ids_and_only_the_first_step_is_fixed():
    support = FirstTokens(["\n", "#", 6], TopK(2)).resolved(texts)
    logits = torch.tensor([[0.0, 9, 8, -5, -6, 0, 0]])
    assert support.at(0).select(logits)[0].tolist() == [[4, 3, 6]]
    assert [support.at(t).select(logits)[0].tolist() for t in (1, 7)] == [[[1, 2]]] * 2
    assert FirstTokens([3]).at(1).select(logits) == (None, None)
    assert support.slots == 3
    assert FirstTokens([3], Nucleus(0.5, 5)).slots == 5


def test_a_step_records_which_ids_it_could_draw():
    logits = torch.tensor([[0.0, 9, 8, -5, -6, 0, 0]])
    for step, kept in ((0, {3, 4}), (1, set())):  # without an id: the whole vocabulary
        drawn = Step(FirstTokens([3, 4]), 1.0, greedy=True).draw(
            logits, logits, torch.zeros(1), step
        )
        assert drawn.support_BK.dtype == torch.int32
        assert {*drawn.support_BK[drawn.support_mask_BK].tolist()} == kept
        inside = sorted(kept) or range(7)
        expected = max(logits[0, i].item() for i in inside) - logits[0, [*inside]].logsumexp(0)
        assert drawn.logprobs_B.item() == pytest.approx(expected.item(), abs=1e-6)
        mass = logits.softmax(1)[0, [*inside]].sum().item()
        assert drawn.kept_mass_B.item() == pytest.approx(mass, rel=1e-5)


def test_a_token_of_a_whole_step_is_not_outside():
    rollout = make_rollout([5], [4], support=3, slots=True)
    rollout.support_mask_BTK[:, 1:] = False
    rollout.support_BTK[:, 0, 0] = rollout.responses_BT[:, 0]
    rollout.support_mask_BTK[:, 0, 0] = True
    assert check_rollout(rollout, FirstTokens([3]), 100) is rollout
    with pytest.raises(UserError, match="3 of 4 sampled tokens are not in the support"):
        check_rollout(rollout, TopK(3), 100)
    # the whole vocabulary has end tokens
    assert _support_sums(rollout, [99])["support/could_not_stop"][0] == 0


def test_gradients_of_both_kinds_of_steps():
    """Against a softmax over the ids of each step, in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64)
    from lightning_mpo.policies.unembedding import Unembedding

    mask = torch.ones(1, 3, dtype=torch.bool)
    slots = torch.tensor([[[True, True], [False, False], [True, False]]])
    ids = torch.tensor([[[3, 4], [0, 0], [2, 0]]])
    tokens = ResponseTokens(mask, torch.arange(3)[None], torch.tensor([[4, 6, 2]]), ids, slots)
    found = tokens.logprobs(hidden, Unembedding(weight, None), entropy_grad=True)
    logits = hidden[0] @ weight.T
    sets, sampled = ([3, 4], list(range(7)), [2]), (4, 6, 2)
    rows = [logits[t, kept].log_softmax(0) for t, kept in enumerate(sets)]
    expected = torch.stack(
        [row[kept.index(i)] for row, kept, i in zip(rows, sets, sampled, strict=True)]
    )
    entropy = torch.stack([-(row.exp() * row).sum() for row in rows])
    torch.testing.assert_close(found.logprobs_BT[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy_BT[0].double(), entropy, atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(total, hidden, retain_graph=True)[0]
        for total in (found.logprobs_BT.sum(), expected.sum())
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FirstTokens([]), "must be a list of ids or texts, got \\[\\]"),
        (lambda: FirstTokens("#"), "must be a list of ids or texts, got '#'"),
        (lambda: FirstTokens([True]), "must hold ids or texts of tokens, got True; write texts in"),
        (lambda: FirstTokens([""]), "must hold ids or texts of tokens, got ''"),
        (lambda: FirstTokens([1], FirstTokens([2])), "must be another support than `FirstTokens`"),
        (lambda: FirstTokens(["ab"]).resolved(texts), "'ab', which is not the text of one token"),
        (lambda: FirstTokens([7]).resolved(texts), "holds the id 7; the policy has 0 to 6"),
        (lambda: FirstTokens(["#", 3]).resolved(texts), "names a token twice: \\['#', 3\\]"),
        (
            lambda: make_objective(
                support=FirstTokens([3]), terms=[KLPenalty(ConstantCoefficient(0.1), "exact")]
            ),
            "`KLPenalty.estimator: exact` sums over a support, and .* FirstTokens",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_which_steps_take_the_whole_vocabulary():
    assert FullVocabulary().some_whole
    assert FirstTokens([3]).some_whole
    assert not FirstTokens([3], TopK(2)).some_whole
    assert not TopK(2).some_whole


def test_ids_of_all_tokens_with_a_text():
    assert ids_containing("stop", ["\n"], TEXTS) == [4, 5]
    assert ids_containing("stop", ["#", 1], TEXTS) == [1, 3, 5]
    assert ids_containing("stop", [4], TEXTS) == [4]
