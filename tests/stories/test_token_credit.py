"""Sampled tokens through the composed loss (S-GRPO): against a loop, and their expectation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.reductions import SequenceMean
from lightning_mpo.objective.selection import AllTokens, HighEntropyTokens, SampledTokens
from lightning_mpo.objective.surrogates import ClippedRatio, PolicyGradient
from lightning_mpo.objective.terms import EntropyBonus
from tests.support.builders import relative_error, right_padded, seeded
from tests.support.token_credit import (
    KL,
    MASK,
    PARTS,
    compose,
    each_reduction,
    experience,
    loss_and_gradient,
    naive_loss,
    table,
)


def chosen_by(selection, mask: Tensor, uniform: Tensor) -> Tensor:
    """Return the weights that a selection gives for these uniform numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator: uniform)
        return selection.choose(mask, seeded(0))


SELECTIONS = {
    "scan": SampledTokens(prefix=2, cap=4, probability=0.5),
    "uniform": SampledTokens(prefix=0, cap=3, probability=0.6, cap_mode="uniform"),
    "unbiased": SampledTokens(prefix=1, cap=None, probability=0.4, unbiased=True),
    "entropy": HighEntropyTokens(0.4),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    "surrogate", [PolicyGradient(), ClippedRatio()], ids=lambda s: type(s).__name__
)
@each_reduction
def test_loss_and_gradient_equal_a_loop_over_chosen_tokens(selection, surrogate, reduction):
    entropy = torch.rand(MASK.shape, generator=seeded(5))
    weights = selection.choose(MASK, seeded(4), entropy)
    assert 0 < (weights > 0).sum() < MASK.sum()
    batch = experience(weights)
    objective = compose(selection, surrogate, reduction, terms=[EntropyBonus(0.1), KL])
    logits = table().requires_grad_()
    expected = naive_loss(objective, batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for parts in (None, *PARTS):
        loss, gradient = loss_and_gradient(objective, batch, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-6
    assert not gradient[weights == 0].any()


def test_with_every_token_chosen_s_grpo_is_grpo_on_the_policy_that_sampled():  # invariant 1
    selection = SampledTokens(prefix=0, cap=None, probability=1.0)
    batch = experience(selection.choose(MASK, seeded(0)))
    on_policy = replace(batch, old_logprobs_BT=None)
    s_grpo = compose(selection, PolicyGradient(), SequenceMean())
    grpo = compose(AllTokens(), ClippedRatio(), SequenceMean())
    ours, theirs = (loss_and_gradient(o, on_policy)[1] for o in (s_grpo, grpo))
    assert relative_error(ours, theirs) < 1e-12
    fewer = replace(on_policy, token_weights_BT=SELECTIONS["scan"].choose(MASK, seeded(0)))
    assert relative_error(loss_and_gradient(s_grpo, fewer)[1], theirs) > 0.1


@each_reduction
@pytest.mark.parametrize(
    "surrogate", [PolicyGradient(), ClippedRatio()], ids=lambda s: type(s).__name__
)
def test_the_expected_unbiased_loss_and_gradient_are_those_of_all_tokens(
    reduction, surrogate
):  # invariant 3
    """All masks of two short rows, each with its probability; some leave a row without any token."""
    mask, probability = right_padded([4, 2], 4), 0.3
    for prefix in (0, 1):
        selection = SampledTokens(prefix=prefix, cap=None, probability=probability, unbiased=True)
        batch = experience(mask.float(), mask, torch.tensor([True, True]))
        terms = {"terms": [EntropyBonus(0.1), KL]}
        wanted = loss_and_gradient(compose(AllTokens(), surrogate, reduction, **terms), batch)
        objective = compose(selection, surrogate, reduction, **terms)
        later = [(b, t) for b, t in mask.nonzero().tolist() if t >= prefix]
        loss, gradient, mass = 0.0, torch.zeros_like(wanted[1]), 0.0
        for kept in itertools.product([False, True], repeat=len(later)):
            uniform = torch.full(mask.shape, 0.99)
            for (b, t), keep in zip(later, kept, strict=True):
                uniform[b, t] = 0.0 if keep else 0.99
            chance = probability ** sum(kept) * (1 - probability) ** (len(kept) - sum(kept))
            weights = chosen_by(selection, mask, uniform)
            part = loss_and_gradient(objective, replace(batch, token_weights_BT=weights))
            loss, gradient, mass = (
                loss + chance * part[0],
                gradient + chance * part[1],
                mass + chance,
            )
        assert mass == pytest.approx(1)
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        assert relative_error(gradient, wanted[1]) < 1e-6
