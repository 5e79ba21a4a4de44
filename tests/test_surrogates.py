"""Laws of every surrogate: how far the policy may move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mpo.action_spaces import Actions
from lightning_mpo.errors import UserError
from lightning_mpo.surrogates import ClippedRatio, Surrogate
from tests.helpers import seeded, subclasses

SURROGATES: list[Surrogate] = [
    ClippedRatio(),
    ClippedRatio(low=0.2, high=0.28),
    ClippedRatio(low=0.3, high=0.1),
    ClippedRatio(low=3e-4, high=4e-4),
    ClippedRatio(low=0.2, high=0.2, dual=3.0),
]
each = pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: f"{type(s).__name__}{list(vars(s).values())}")


def actions(log_ratios: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Actions:
    mask = torch.ones_like(log_ratios, dtype=torch.bool) if mask is None else mask
    return Actions(log_ratios, advantages, mask, mask.double())


def grid() -> tuple[Tensor, Tensor]:
    """Return log-ratios from -2.5 to 2.5, dense around 0, and advantages of both signs. Shape `[4, U]`."""
    line = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    log_ratios = (line.pow(3) * 0.75).expand(4, -1)
    advantages = torch.tensor([[2.0], [0.5], [-0.5], [-2.0]]).double().expand_as(log_ratios)
    return log_ratios, advantages


def gradient(surrogate: Surrogate, log_ratios: Tensor, advantages: Tensor) -> Tensor:
    leaf = log_ratios.clone().requires_grad_()
    return torch.autograd.grad(surrogate.loss(actions(leaf, advantages)).sum(), leaf)[0]


def test_the_list_has_every_surrogate():
    assert subclasses(Surrogate) == {type(s) for s in SURROGATES}


@each
def test_at_ratio_one_the_gradient_is_minus_the_advantage(surrogate):
    advantages = torch.randn(3, 5, generator=seeded(0), dtype=torch.float64)
    advantages[0, 0] = 0
    torch.testing.assert_close(gradient(surrogate, torch.zeros(3, 5).double(), advantages), -advantages)


@each
def test_the_loss_falls_with_the_ratio_of_good_actions_and_rises_with_that_of_bad_ones(surrogate):
    log_ratios, advantages = grid()
    step = surrogate.loss(actions(log_ratios, advantages)).diff(dim=1) * advantages[:, 1:].sign()
    assert (step <= 1e-15).all()
    assert (step < 0).any(1).all()


@each
def test_nothing_is_earned_beyond_the_trust_region(surrogate):
    """The loss has the floor that it reaches at the edge of the region: -(1 + high)·A or (1 - low)·|A|."""
    log_ratios, advantages = grid()
    floor = torch.where(advantages > 0, -(1 + surrogate.high) * advantages, -(1 - surrogate.low) * advantages)
    assert (surrogate.loss(actions(log_ratios, advantages)) >= floor - 1e-12).all()


@each
def test_what_moved_away_from_good_is_pulled_back_at_full_strength(surrogate):
    """A > 0 and a ratio below the region, or A < 0 and one above (up to the dual clip): the gradient is -R·A."""
    log_ratios, advantages = grid()
    dual = surrogate.dual or math.inf
    away = ((log_ratios < 0) & (advantages > 0)) | ((log_ratios > 0) & (advantages < 0) & (log_ratios < math.log(dual)))
    expected = -log_ratios.exp() * advantages
    torch.testing.assert_close(gradient(surrogate, log_ratios, advantages)[away], expected[away])


@each
def test_the_clipped_flags_are_where_the_gradient_is_zero(surrogate):
    log_ratios, advantages = grid()
    flags = surrogate.clipped(actions(log_ratios, advantages))
    assert torch.equal(flags, gradient(surrogate, log_ratios, advantages) == 0)
    assert flags.any()
    assert not flags.all()


@each
def test_only_actions_are_flagged(surrogate):
    log_ratios, advantages = grid()
    mask = torch.rand(log_ratios.shape, generator=seeded(1)) < 0.5
    flags = surrogate.clipped(actions(log_ratios, advantages, mask))
    assert torch.equal(flags, surrogate.clipped(actions(log_ratios, advantages)) & mask)


@each
def test_absurd_ratios_stay_finite(surrogate):
    log_ratios = torch.tensor([[-1e4, 1e4, -60.0, 60.0]])
    for sign in (-1.0, 1.0):
        advantages = torch.full_like(log_ratios, sign)
        assert torch.isfinite(surrogate.loss(actions(log_ratios, advantages))).all()
        assert torch.isfinite(gradient(surrogate, log_ratios, advantages)).all()


def test_clipped_ratio_by_hand():
    """low 0.2, high 0.28, dual 3, over ratios 0.5, 1.5 and 4."""
    log_ratios = torch.tensor([[0.5, 1.5, 4.0]]).double().log()
    surrogate = ClippedRatio(0.2, 0.28, dual=3.0)
    good = surrogate.loss(actions(log_ratios, torch.full_like(log_ratios, 2.0)))
    torch.testing.assert_close(good, torch.tensor([[-1.0, -2.56, -2.56]]).double())
    bad = surrogate.loss(actions(log_ratios, torch.full_like(log_ratios, -2.0)))
    torch.testing.assert_close(bad, torch.tensor([[1.6, 3.0, 6.0]]).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, r"`ClippedRatio.low` must be in \(0, 1\), got 0.0"),
        ({"low": 1.0}, "`ClippedRatio.low`"),
        ({"high": 0.0}, "`ClippedRatio.high` must be positive, got 0.0"),
        ({"dual": 1.0}, "`ClippedRatio.dual` must be over 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        ClippedRatio(**arguments)
