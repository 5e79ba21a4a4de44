"""Laws of every surrogate: how far the policy may move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import Actions, TokenTerms
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.linear_bound import LinearBound
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.preferences import PairwiseLogistic
from lightning_mpo.objective.surrogates import (
    AsymmetricRatio,
    BoundedTokens,
    ClippedRatio,
    ClippedWeight,
    PolicyGradient,
    Surrogate,
)
from tests.support.builders import seeded, subclasses

SURROGATES: list[Surrogate] = [
    ClippedRatio(),
    ClippedRatio(low=0.2, high=0.28),
    ClippedRatio(low=0.3, high=0.1),
    ClippedRatio(low=3e-4, high=4e-4),
    ClippedRatio(low=0.2, high=0.2, dual=3.0),
    ClippedRatio(low=0.0, high=0.0),
    LinearBound(),
    LinearBound(limit=1.0),
    PolicyGradient(),
    ClippedWeight(),
    ClippedWeight(low=0.2, high=0.2),
    AsymmetricRatio(),
    AsymmetricRatio(low=0.1, high=0.3, cap_positive=1.0, cap_negative=2.0),
    AsymmetricRatio(wide=0.4),
    BoundedTokens(),
    DivergenceMask(),
    DivergenceMask(delta=0.05, delta_up=0.1, divergence="kl", cap=None),
    DivergenceMask(delta=0.1, top_k=2),
    DivergenceMask(delta=0.05, divergence="kl", top_k=2),
    PositionClip(),
    PositionClip(low=0.3, high=0.2, dual=None, power=-0.5),
    PositionClip(low=0.2, high=0.2, dual=1.0, power=0.0),
]
REGIONS = [s for s in SURROGATES if type(s).clipped is not Surrogate.clipped]
"""Those with a trust region, beyond which nothing is learnt."""


def name(surrogate: Surrogate) -> str:
    return f"{type(surrogate).__name__}{list(vars(surrogate).values())}"


each = pytest.mark.parametrize("surrogate", SURROGATES, ids=name)
regions = pytest.mark.parametrize("surrogate", REGIONS, ids=name)
ratios = pytest.mark.parametrize(
    "surrogate", [s for s in SURROGATES if isinstance(s, ClippedRatio)], ids=name
)


def actions(log_ratios: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Actions:
    mask = torch.ones_like(log_ratios, dtype=torch.bool) if mask is None else mask
    anchor = torch.full_like(log_ratios, math.log(0.08)).detach()
    entropy = torch.arange(log_ratios.shape[1]).remainder(7).expand_as(log_ratios)
    now = (
        log_ratios + anchor
    ).detach()  # another id with 0.3 gains or loses with the rest, and one slot is empty
    other = (0.3 * (1 - now.exp()).clamp(min=1e-9) / 0.92).log()
    empty = torch.full_like(now, -torch.inf)
    candidates = [
        torch.stack(parts, -1)
        for parts in ((now, other, empty), (anchor, 0 * now + math.log(0.3), empty))
    ]
    tokens = TokenTerms(log_ratios + anchor, anchor, entropy.double(), *candidates)
    return Actions(log_ratios, advantages, mask, mask.double(), tokens)


def grid() -> tuple[Tensor, Tensor]:
    """Return log-ratios from -2.5 to 2.5, dense around 0, and advantages of both signs. Shape `[4, U]`."""
    line = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    log_ratios = (line.pow(3) * 0.75).expand(4, -1)
    advantages = torch.tensor([[2.0], [0.5], [-0.5], [-2.0]]).double().expand_as(log_ratios)
    return log_ratios, advantages


def gradient(surrogate: Surrogate, log_ratios: Tensor, advantages: Tensor) -> Tensor:
    leaf = log_ratios.clone().requires_grad_()
    bounded = surrogate.bound(leaf, advantages)
    return torch.autograd.grad(surrogate.loss(actions(bounded, advantages)).sum(), leaf)[0]


def test_the_list_has_every_surrogate():
    """`PairwiseLogistic` compares responses: `tests/objective/test_preferences.py`."""
    assert subclasses(Surrogate) == {type(s) for s in SURROGATES} | {PairwiseLogistic}


@each
def test_at_ratio_one_the_gradient_is_minus_the_advantage(surrogate):
    advantages = torch.randn(3, 5, generator=seeded(0), dtype=torch.float64)
    advantages[0, 0] = 0
    torch.testing.assert_close(
        gradient(surrogate, torch.zeros(3, 5).double(), advantages), -advantages
    )


@each
def test_a_step_never_makes_a_good_action_less_probable_or_a_bad_one_more(surrogate):
    log_ratios, advantages = grid()
    push = gradient(surrogate, log_ratios, advantages) * advantages.sign()
    assert (push <= 0).all()
    assert (push < 0).any(1).all()


@ratios
def test_nothing_is_earned_beyond_the_trust_region(surrogate):
    """The loss has the floor that it reaches at the edge of the region: -(1 + high)·A or (1 - low)·|A|."""
    log_ratios, advantages = grid()
    floor = torch.where(
        advantages > 0, -(1 + surrogate.high) * advantages, -(1 - surrogate.low) * advantages
    )
    assert (surrogate.loss(actions(log_ratios, advantages)) >= floor - 1e-12).all()


@ratios
def test_what_moved_away_from_good_is_pulled_back_at_full_strength(surrogate):
    """A > 0 and a ratio below the region, or A < 0 and one above (up to the dual clip): the gradient is -R·A."""
    log_ratios, advantages = grid()
    dual = surrogate.dual or math.inf
    away = ((log_ratios < 0) & (advantages > 0)) | (
        (log_ratios > 0) & (advantages < 0) & (log_ratios < math.log(dual))
    )
    expected = -log_ratios.exp() * advantages
    torch.testing.assert_close(gradient(surrogate, log_ratios, advantages)[away], expected[away])


@regions
def test_the_clipped_flags_are_where_the_gradient_is_zero(surrogate):
    log_ratios, advantages = grid()
    flags = surrogate.clipped(actions(log_ratios, advantages))
    assert torch.equal(flags, gradient(surrogate, log_ratios, advantages) == 0)
    assert flags.any()
    assert not flags.all()


@pytest.mark.parametrize("surrogate", [s for s in REGIONS if not getattr(s, "power", 0)], ids=name)
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


def test_candidates_see_what_the_sampled_token_does_not():
    """A token that hardly moved, in a distribution that did: the binary divergence keeps it, the bucketed one does not."""
    then, now = (
        torch.tensor([[[0.1, 0.6, 0.2]]]).double().log(),
        torch.tensor([[[0.11, 0.3, 0.5]]]).double().log(),
    )
    tokens = TokenTerms(now[..., 0], then[..., 0], None, now, then)
    one = torch.ones(1, 1, dtype=torch.bool)
    action = Actions(now[..., 0] - then[..., 0], one.double(), one, one.double(), tokens)
    assert not DivergenceMask(0.15).clipped(action).item()
    assert DivergenceMask(0.15, top_k=2).clipped(action).item()
    with pytest.raises(RuntimeError, match="`DivergenceMask.top_k` needs candidates"):
        DivergenceMask(top_k=2).loss(replace(action, tokens=TokenTerms(now[..., 0], then[..., 0])))


def test_more_candidates_than_the_vocabulary_has_ids_are_refused():
    DivergenceMask(top_k=16).check(16)
    DivergenceMask().check(1)
    with pytest.raises(
        UserError, match="`DivergenceMask.top_k` must be at most the vocabulary size 16, got 20"
    ):
        DivergenceMask(top_k=20).check(16)


def test_clipped_ratio_by_hand():
    """low 0.2, high 0.28, dual 3, over ratios 0.5, 1.5 and 4."""
    log_ratios = torch.tensor([[0.5, 1.5, 4.0]]).double().log()
    surrogate = ClippedRatio(0.2, 0.28, dual=3.0)
    good = surrogate.loss(actions(log_ratios, torch.full_like(log_ratios, 2.0)))
    torch.testing.assert_close(good, torch.tensor([[-1.0, -2.56, -2.56]]).double())
    bad = surrogate.loss(actions(log_ratios, torch.full_like(log_ratios, -2.0)))
    torch.testing.assert_close(bad, torch.tensor([[1.6, 3.0, 6.0]]).double())


def test_a_clip_of_zero_corrects_what_moved_the_wrong_way_and_no_more():
    """At ratio 1 the whole gradient passes. Later a good action learns below 1, a bad one above 1."""
    log_ratios, advantages = grid()
    ratios = log_ratios.exp()
    wrong = ((ratios - 1) * advantages < 0) | (ratios == 1)
    expected = torch.where(wrong, -ratios * advantages, 0.0)
    torch.testing.assert_close(
        gradient(ClippedRatio(low=0.0, high=0.0), log_ratios, advantages), expected
    )


def test_a_clipped_weight_never_stops_a_gradient():
    """The weight of the policy gradient: the ratio within the bounds, the bound beyond."""
    log_ratios, advantages = grid()
    for surrogate, low, high in ((ClippedWeight(), 0.0, 5.0), (ClippedWeight(0.2, 0.2), 0.8, 1.2)):
        expected = -log_ratios.exp().clamp(low, high) * advantages
        torch.testing.assert_close(gradient(surrogate, log_ratios, advantages), expected)


def test_the_weights_of_the_asymmetric_ratio_are_those_of_the_table():
    """docs/algorithms.md 5.4, clip 0.2, caps 3: what multiplies A times the gradient of the log-prob."""
    log_ratios = torch.tensor([[0.2, 0.5, 0.9, 1.1, 1.19, 1.5, 4.0]]).double().log()
    good, bad = torch.ones_like(log_ratios), -torch.ones_like(log_ratios)
    table = {
        1.0: [3.0, 2.0, 1 / 0.9, 1 / 1.1, 1 / 1.19, 0.0, 0.0],
        -1.0: [0.0, 0.0, 0.9, 1.1, 1.19, 1.5, 3.0],
    }
    for advantages in (good, bad):
        weights = gradient(AsymmetricRatio(), log_ratios, advantages) / -advantages
        torch.testing.assert_close(weights, torch.tensor([table[advantages[0, 0].item()]]).double())
    uncapped = AsymmetricRatio(cap_negative=1e9)  # then bad actions are PPO's
    torch.testing.assert_close(
        gradient(uncapped, log_ratios, bad), gradient(ClippedRatio(), log_ratios, bad)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClippedWeight(low=0.0), r"`ClippedWeight.low` must be in \(0, 1\], got 0.0"),
        (lambda: ClippedWeight(high=0.0), "`ClippedWeight.high` must be positive, got 0.0"),
        (lambda: AsymmetricRatio(low=1.0), r"`AsymmetricRatio.low` must be in \(0, 1\), got 1.0"),
        (lambda: AsymmetricRatio(high=-1.0), "`AsymmetricRatio.high` must be positive, got -1.0"),
        (
            lambda: AsymmetricRatio(cap_positive=0.5),
            "`AsymmetricRatio.cap_positive` must be at least 1, got 0.5",
        ),
        (
            lambda: AsymmetricRatio(cap_negative=0.5),
            "`AsymmetricRatio.cap_negative` must be at least 1, got 0.5",
        ),
    ],
)
def test_bounds_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": -0.1}, r"`ClippedRatio.low` must be in \[0, 1\), got -0.1"),
        ({"low": 1.0}, "`ClippedRatio.low`"),
        ({"high": -0.1}, "`ClippedRatio.high` must not be negative, got -0.1"),
        ({"dual": 1.0}, "`ClippedRatio.dual` must be above 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        ClippedRatio(**arguments)
