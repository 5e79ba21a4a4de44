"""Calibration, KL divergence and gradient parts against naive loops; expectations by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.head_diagnostics import (
    BINS,
    calibration_sums,
    excess_entropy,
    expected_calibration_error,
    gradient_parts,
)
from tests.support.builders import right_padded, seeded

V = 5


def divergence(p: Tensor, q: Tensor) -> float:
    """Return KL(p‖q) by a loop over ids."""
    return sum(float(a * (a.log() - b.log())) for a, b in zip(p, q, strict=True) if a > 0)


def distributions(*shape: int, seed: int = 0) -> Tensor:
    logits = 2 * torch.randn(*shape, V, generator=seeded(seed), dtype=torch.float64)
    return logits.softmax(-1)


# --- calibration ----------------------------------------------------------------------------------


def test_a_head_that_is_right_as_often_as_it_says_has_no_error():
    confidence_BT = torch.tensor([[0.75, 0.75, 0.75, 0.75], [0.5, 0.5, 0.9, 0.9]])
    hit_mask_BT = torch.tensor([[True, True, True, False], [True, False, True, True]])
    mask_BT = right_padded([4, 2], 4)
    sums = calibration_sums(confidence_BT, hit_mask_BT, mask_BT)
    assert expected_calibration_error(sums) == 0
    everything = calibration_sums(confidence_BT, hit_mask_BT, torch.ones_like(mask_BT))
    assert expected_calibration_error(everything).item() == pytest.approx(0.2 / 8)


def test_the_error_is_that_of_a_loop_and_adds_up_over_batches():
    draw = seeded(1)
    confidence_BT = torch.rand(6, 50, generator=draw)
    confidence_BT[0, :3] = torch.tensor([0.0, 1.0, 0.1])
    hit_mask_BT = torch.rand(6, 50, generator=draw) < 0.4
    mask_BT = right_padded([50, 3, 20, 41, 1, 9], 50)
    expected, number = 0.0, int(mask_BT.sum())
    for k in range(BINS):
        inside = [
            (float(confidence_BT[b, t]), bool(hit_mask_BT[b, t]))
            for b, t in mask_BT.nonzero().tolist()
            if min(int(float(confidence_BT[b, t].double()) * BINS), BINS - 1) == k
        ]
        if inside:
            gap = sum(hit for _, hit in inside) - sum(confidence for confidence, _ in inside)
            expected += abs(gap) / number
    parts = [
        calibration_sums(*(x[rows] for x in (confidence_BT, hit_mask_BT, mask_BT)))
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert expected_calibration_error(parts[0] + parts[1]).item() == pytest.approx(expected)
    assert expected > 0.1


# --- KL divergence from the policy --------------------------------------------------------------------


def test_a_calibrated_head_has_no_excess_and_a_sharper_one_the_divergence():
    p_BV = distributions(3)
    same_BJV = p_BV[:, None].expand(3, 4, V).log()
    mask_BJ = torch.ones(3, 4, dtype=torch.bool)
    none_B = excess_entropy(same_BJV, mask_BJ, p_BV.log())
    torch.testing.assert_close(none_B, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    sharper_BV = (2 * p_BV.log()).softmax(-1)
    expected = [divergence(p, q) for p, q in zip(p_BV, sharper_BV, strict=True)]
    assert excess_entropy(same_BJV, mask_BJ, sharper_BV.log()).tolist() == pytest.approx(expected)
    assert min(expected) > 1e-2


def test_one_continuation_is_taken_as_it_is():
    p_BJV, q_BV = distributions(4, 1), distributions(4, seed=1)
    p_BJV[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    q_BV[0] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    values_B = excess_entropy(p_BJV.log(), torch.ones(4, 1, dtype=torch.bool), q_BV.log())
    expected = [divergence(p, q) for p, q in zip(p_BJV[:, 0], q_BV, strict=True)]
    assert values_B.tolist() == pytest.approx(expected)


def test_continuations_that_ended_are_not_read():
    p_BJV, q_BV = distributions(2, 4), distributions(2, seed=1)
    mask_BJ = torch.tensor([[True, False, True, True], [False, True, True, False]])
    broken_BJV = p_BJV.log().masked_fill(~mask_BJ[..., None], torch.nan)
    values_B = excess_entropy(broken_BJV, mask_BJ, q_BV.log())
    for b in range(2):
        alone = p_BJV[b : b + 1, mask_BJ[b]].log()
        expected = excess_entropy(alone, torch.ones(alone.shape[:2]).bool(), q_BV[b : b + 1].log())
        assert values_B[b].item() == pytest.approx(expected.item())


def test_the_jackknife_takes_most_of_the_bias_away():
    """The expectation over all draws of four continuations out of three, by enumeration."""
    chances = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ends_SV, q_V = distributions(3), distributions(1, seed=4)[0]
    truth = divergence(chances @ ends_SV, q_V)
    estimate, plain = 0.0, 0.0
    for draw in itertools.product(range(3), repeat=4):
        chance, ends_JV = float(chances[list(draw)].prod()), ends_SV[list(draw)]
        mask_BJ = torch.ones(1, 4, dtype=torch.bool)
        estimate += chance * excess_entropy(ends_JV[None].log(), mask_BJ, q_V[None].log()).item()
        plain += chance * divergence(ends_JV.mean(0), q_V)
    assert plain - truth > 0.05, "the entropy of the mean of a few continuations is too small"
    assert abs(estimate - truth) < 0.3 * (plain - truth)


# --- gradients ------------------------------------------------------------------------------------


def test_parts_are_those_of_the_concatenated_gradients():
    draw = seeded(3)
    own, later, entropy = (
        [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 2), (4,))]
        for _ in range(3)
    )
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (own, later, entropy)]
    future, spurious = gradient_parts(own, later, entropy).tolist()
    assert future == pytest.approx((flat[1].norm() / flat[0].norm()).item())
    along = (flat[1] @ flat[2]).abs() / flat[2].norm()
    assert spurious == pytest.approx((along / flat[0].norm()).item())
    assert 0 < spurious < future


def test_missing_and_zero_gradients():
    one, zero = torch.ones(3), torch.zeros(3)
    assert gradient_parts([one, None], [None, one], [one, one]).tolist() == pytest.approx(
        [1.0, (3 / 6**0.5) / 3**0.5]
    )
    assert gradient_parts([one], [None], [None]).tolist() == [0.0, 0.0]
    assert gradient_parts([one], [one], [zero]).tolist() == [1.0, 0.0]
    assert gradient_parts([zero], [one], [one]).isnan().all()
    with pytest.raises(ValueError, match="shorter"):
        gradient_parts([one], [one, one], [one])
