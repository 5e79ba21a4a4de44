"""Diagnostics against plain counts and sums."""

import math

import pytest
import torch

from lightning_mpo.functional.diagnostics import (
    clip_distance,
    clustered_mean,
    effective_sample_size,
    jackknife_error,
    matching_clip,
    signal_and_noise,
    weight_moments,
)
from lightning_mpo.functional.surrogates import safe_ratio
from lightning_mpo.functional.trust_regions import outside_clip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_sample_size_is_the_definition_and_adds_up():
    log_weights, mask = randn(6, 5), randn(6, 5, seed=1) > 0
    weights = [math.exp(x) for x in log_weights[mask].tolist()]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    whole = weight_moments(log_weights, mask)
    assert float(effective_sample_size(whole)) == pytest.approx(expected, rel=1e-12)
    parts = weight_moments(log_weights[:2], mask[:2]) + weight_moments(log_weights[2:], mask[2:])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    one_of_many = torch.tensor([0.0] + [-200.0] * 9)
    assert float(
        effective_sample_size(weight_moments(one_of_many, torch.ones(10).bool()))
    ) == pytest.approx(0.1)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.6])
def test_a_clip_stops_what_has_gone_further(epsilon):
    log_ratios, advantages = randn(40, 5) / 2, randn(40, 5, seed=1)
    advantages[:, 0] = 0
    stopped = clip_distance(log_ratios, advantages) > epsilon
    ratios = safe_ratio(log_ratios)
    assert torch.equal(stopped, outside_clip(ratios, advantages, low=epsilon, high=epsilon))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.3])
def test_a_matching_clip_stops_as_many(fraction):
    distances, mask = randn(30, 10), randn(30, 10, seed=1) > -1
    epsilon = matching_clip(distances.masked_fill(~mask, torch.nan), mask, fraction)
    assert int((distances[mask] > epsilon).sum()) == round(fraction * int(mask.sum()))


def test_a_matching_clip_that_does_not_exist_is_nan():
    distances, mask = torch.tensor([[0.4, -0.1, 0.0, -0.2]]), torch.ones(1, 4, dtype=torch.bool)
    assert matching_clip(distances, mask, 0.25) == pytest.approx(0.2)
    assert math.isnan(matching_clip(distances, mask, 0.5))
    assert matching_clip(distances, mask, 0.0) == pytest.approx(0.4, rel=1e-4)
    with pytest.raises(ValueError, match="must hold an action"):
        matching_clip(distances, ~mask, 0.5)


def test_signal_and_noise_are_the_definition_and_unbiased():
    P, D, runs = 5, 3, 4000
    truth = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    draws = truth + 2 * randn(runs, P, D)
    signals, noises = [], []
    for x in draws:
        signal, noise = signal_and_noise(float(x.sum(0).square().sum()), float(x.square().sum()), P)
        assert noise == pytest.approx(float(x.var(0).sum()) / P, rel=1e-9)
        assert signal + noise == pytest.approx(float(x.mean(0).square().sum()), rel=1e-9)
        signals.append(signal)
        noises.append(noise)
    error = 4 / math.sqrt(runs) * torch.tensor([signals, noises], dtype=torch.float64).std(1)
    assert sum(signals) / runs == pytest.approx(1.25, abs=float(error[0]))
    assert sum(noises) / runs == pytest.approx(4 * D / P, abs=float(error[1]))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = randn(20)
    without = [float((x.sum() - x[j]) / 19) for j in range(20)]
    assert jackknife_error(without) == pytest.approx(float(x.std()) / math.sqrt(20), rel=1e-9)


def test_a_clustered_mean_counts_prompts_and_not_tokens():
    totals, counts = torch.tensor([1.0, 4.0, 3.0]), torch.tensor([2.0, 4.0, 4.0])
    mean, error = clustered_mean(totals, counts)
    assert mean == pytest.approx(0.8)
    assert error == pytest.approx(math.sqrt(1.5 * ((1 - 1.6) ** 2 + 0.8**2 + 0.2**2)) / 10)
    equal = clustered_mean(totals, torch.full((3,), 5.0))
    assert equal[1] == pytest.approx(float((totals / 5).std()) / math.sqrt(3))
    repeated = clustered_mean(
        10 * totals, 10 * counts
    )  # more tokens of the same prompts tell nothing new
    assert repeated == pytest.approx((mean, error))
    assert math.isnan(clustered_mean(torch.zeros(2), torch.zeros(2))[0])
    assert math.isnan(clustered_mean(totals[:1], counts[:1])[1])


@pytest.mark.parametrize(
    "few", [lambda: signal_and_noise(1.0, 1.0, 1), lambda: jackknife_error([1.0])]
)
def test_spread_needs_two(few):
    with pytest.raises(ValueError, match="at least 2"):
        few()


def test_messages_name_the_argument():
    with pytest.raises(TypeError, match="`mask` must be bool"):
        weight_moments(randn(3), randn(3))
    with pytest.raises(ValueError, match=r"`advantages_BU` must have shape \[B=2, U=3\]"):
        clip_distance(randn(2, 3), randn(2, 2))
