"""DPPO's divergences and mask: the invariants of docs/algorithms.md 16.3, by their numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.surrogates import (
    asymmetric_ratio,
    clipped_ratio,
    divergence_mask,
    safe_ratio,
)
from lightning_mpo.functional.trust_regions import (
    binary_kl,
    binary_tv,
    bucket_kl,
    bucket_tv,
    outside_clip,
    outside_trust_region,
)
from tests.support.builders import relative_error, seeded

V, N = 7, 4000


def policies(seed: int = 0, spread: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of two nearby policies over V ids, and sampled ids."""
    g = seeded(seed)
    then = torch.randn(N, V, generator=g, dtype=torch.float64) * 2
    now = then + spread * torch.randn(N, V, generator=g, dtype=torch.float64)
    return now.log_softmax(-1), then.log_softmax(-1), torch.randint(0, V, (N,), generator=g)


def batch(spread: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of tokens, those at sampling, and advantages. Shape `[4, N / 4]`."""
    now, then, ids = policies(spread=spread)
    picked = [x.gather(1, ids[:, None]).view(4, -1) for x in (now, then)]
    return picked[0], picked[1], torch.randn(4, N // 4, generator=seeded(3), dtype=torch.float64)


def gradient(loss, logprobs: Tensor, *others: Tensor, **options) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *others, **options).sum(), leaf)[0]


def test_1_with_the_ratio_as_distance_it_is_the_clip_of_ppo():
    """Where μ(o) is one number for all tokens, |r - 1| = D_TV / μ, so that eps = delta / μ gives PPO's mask."""
    mu, eps = 0.05, 0.2
    now = (torch.rand(3, 500, generator=seeded(1), dtype=torch.float64) * 2 * mu).log()
    then, advantages = (
        torch.full_like(now, math.log(mu)),
        torch.randn(3, 500, generator=seeded(2), dtype=torch.float64),
    )
    ours = gradient(divergence_mask, now, then, advantages, delta=mu * eps)
    leaf = now.clone().requires_grad_()
    clipped = clipped_ratio(leaf - then, advantages, low=eps, high=eps)
    assert relative_error(ours, torch.autograd.grad(clipped.sum(), leaf)[0]) < 1e-12
    assert (ours == 0).any()
    assert (ours != 0).any()


def test_2_without_a_bound_it_is_the_importance_weighted_policy_gradient():
    now, then, advantages = batch()
    ratio = (now - then).exp()
    free = gradient(divergence_mask, now, then, advantages, delta=1e9)
    torch.testing.assert_close(free, -ratio * advantages)
    capped = gradient(divergence_mask, now, then, advantages, delta=1e9, cap=1.5)
    torch.testing.assert_close(capped, -ratio.clamp(max=1.5) * advantages)


def test_3_on_the_policy_that_sampled_it_is_reinforce():
    now, _, advantages = batch()
    for divergence in ("tv", "kl"):
        torch.testing.assert_close(
            gradient(divergence_mask, now, now, advantages, delta=1e-6, divergence=divergence),
            -advantages,
        )


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_4_and_7_only_tokens_that_move_where_their_advantage_pushes_are_masked_and_the_mask_has_no_gradient(
    divergence,
):
    now, then, advantages = batch()
    outside = outside_trust_region(now, then, advantages, delta=0.05, divergence=divergence)
    assert outside.any()
    assert not (outside & (advantages * (now - then) <= 0)).any()
    weights = (now - then).exp() * ~outside
    torch.testing.assert_close(
        gradient(divergence_mask, now, then, advantages, delta=0.05, divergence=divergence),
        -weights * advantages,
    )


def test_5_finer_buckets_see_more_and_all_ids_see_everything():
    now, then, ids = policies()
    picked = [x.gather(1, ids[:, None])[:, 0] for x in (now, then)]
    order = then.argsort(1, descending=True)
    full_tv = (now.exp() - then.exp()).abs().sum(-1) / 2
    full_kl = (then.exp() * (then - now)).sum(-1)
    for coarse, fine, full in ((binary_tv, bucket_tv, full_tv), (binary_kl, bucket_kl, full_kl)):
        last = coarse(*picked)
        for k in (2, 4, V):
            slots = order[:, :k]
            inside = (slots == ids[:, None]).any(1, keepdim=True)
            parts = [
                torch.cat(
                    [x.gather(1, slots), x.gather(1, ids[:, None]).masked_fill(inside, -torch.inf)],
                    1,
                )
                for x in (now, then)
            ]
            finer = fine(*parts)
            assert (finer >= last - 1e-6).all()
            assert (finer <= full + 1e-6).all()
            last = finer
        torch.testing.assert_close(
            last, full, rtol=1e-4, atol=2e-6
        )  # the empty bucket counts with 1e-7


def test_6_total_variation_is_mu_times_the_distance_of_the_ratio_and_pinsker_holds():
    now, then, _ = batch()
    torch.testing.assert_close(binary_tv(now, then), then.exp() * ((now - then).exp() - 1).abs())
    assert (binary_kl(now, then) >= 2 * binary_tv(now, then).square() - 1e-12).all()


def test_8_the_mask_of_total_variation_is_symmetric():
    """Swapping the policies and the signs of advantages gives the same mask."""
    now, then, advantages = batch()
    forth = outside_trust_region(now, then, advantages, delta=0.05)
    back = outside_trust_region(then, now, -advantages, delta=0.05)
    assert torch.equal(forth, back)


def test_9_the_ratio_form_has_the_same_gradient():
    now, then, advantages = batch()
    outside = outside_trust_region(now, then, advantages, delta=0.05)
    leaf = now.clone().requires_grad_()
    (ratio_form,) = torch.autograd.grad((-advantages * ~outside * (leaf - then).exp()).sum(), leaf)
    torch.testing.assert_close(
        gradient(divergence_mask, now, then, advantages, delta=0.05), ratio_form
    )


@pytest.mark.parametrize(
    ("mu", "pi", "tv", "kl", "masked"),
    [(1e-4, 1e-2, 0.0099, 0.0095, set()), (0.99, 0.80, 0.19, 0.18, {"tv", "kl"})],
)
def test_worked_examples_of_the_paper(mu, pi, tv, kl, masked):
    now, then = torch.tensor([[pi]]).log(), torch.tensor([[mu]]).log()
    assert binary_tv(now, then).item() == pytest.approx(tv, abs=1e-4)
    assert binary_kl(now, then).item() == pytest.approx(kl, abs=2e-3)
    sign = torch.tensor([[1.0 if pi > mu else -1.0]])
    stopped = {
        name
        for name, delta in (("tv", 0.15), ("kl", 0.05))
        if outside_trust_region(now, then, sign, delta=delta, divergence=name).item()
    }
    assert stopped == masked


def test_float32_is_exact_where_probabilities_are_near_one():
    for p, q in ((1 - 1e-4, 1 - 3e-4), (1 - 1e-6, 1 - 1e-3), (0.5, 0.7), (1e-6, 1e-3)):
        exact = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        now, then = torch.tensor(math.log1p(-(1 - q))), torch.tensor(math.log1p(-(1 - p)))
        assert binary_kl(now, then).item() == pytest.approx(exact, rel=2e-3, abs=1e-9)
    certain = torch.zeros(3)
    assert not binary_kl(certain, certain).any()
    assert torch.isfinite(binary_kl(certain, torch.tensor([-1.0, -1e-3, 0.0]))).all()


def test_bfloat16_is_compared_in_float32():
    now, then = torch.tensor([[0.9]]).log().bfloat16(), torch.tensor([[0.7]]).log().bfloat16()
    assert outside_trust_region(now, then, torch.ones(1, 1), delta=0.19).item()


def test_bad_options_are_refused():
    now, then, advantages = batch()
    for options, message in (
        ({"delta": 0.0}, "`delta` must be above 0"),
        ({"delta": (0.1, -0.1)}, "`delta` must be above 0"),
        ({"delta": 0.1, "divergence": "js"}, "`divergence` must be 'tv' or 'kl'"),
        ({"delta": 0.1, "cap": 0.5}, "`cap` must be at least 1"),
        ({"delta": 0.1, "candidate_logprobs_BTK": now[..., None]}, "must be given together"),
    ):
        with pytest.raises(ValueError, match=message):
            divergence_mask(now, then, advantages, **options)


# --- the clip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [None, 1.5])
def test_the_clip_marks_the_actions_without_gradient(dual):
    log_ratios = torch.randn(50, 4, generator=seeded(0), dtype=torch.float64) / 2
    advantages = torch.randn(50, 4, generator=seeded(1), dtype=torch.float64)
    options = {"low": 0.2, "high": 0.3, "dual": dual}
    log_ratios.requires_grad_()
    clipped_ratio(log_ratios, advantages, **options).sum().backward()
    marks = outside_clip(safe_ratio(log_ratios), advantages, **options)
    assert torch.equal(marks, log_ratios.grad == 0)
    assert 0.1 < float(marks.double().mean()) < 0.9


def test_the_clip_of_single_tokens_may_differ():
    log_ratios = torch.randn(50, 4, generator=seeded(0), dtype=torch.float64).requires_grad_()
    advantages = torch.randn(50, 4, generator=seeded(1), dtype=torch.float64)
    low = torch.full((50, 4), 0.2).index_fill(1, torch.tensor([0]), 0.4)
    clip = {"low": low, "high": low + 0.1}
    old, caps = torch.zeros(50, 4, dtype=torch.float64), {"cap_positive": 3.0, "cap_negative": 3.0}
    loss = asymmetric_ratio(log_ratios, old, advantages, **clip, **caps)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratios)
    marks = outside_clip(safe_ratio(log_ratios.detach()), advantages, **clip)
    assert torch.equal(marks, slope == 0)
    assert marks[:, 0].any()
    assert marks[:, 1:].any()


def test_the_clip_refuses_tensors_of_other_shapes():
    with pytest.raises(ValueError, match="advantages"):
        outside_clip(torch.ones(2, 3), torch.ones(2, 2), low=0.2, high=0.2)
