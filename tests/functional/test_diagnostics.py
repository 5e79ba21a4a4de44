"""Diagnostics against plain counts and sums."""

import math

import pytest
import torch

from lightning_mpo.functional.diagnostics import (
    clip_distance,
    clip_fraction,
    clustered_mean,
    could_not_stop,
    effective_sample_size,
    jackknife_error,
    kept_mass,
    matching_clip,
    score_variance,
    signal_and_noise,
    support_overlap,
    weight_moments,
)
from lightning_mpo.functional.surrogates import clipped_ratio


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clip_fraction_marks_the_actions_without_gradient():
    log_ratios, advantages = (randn(50, 4) / 2).requires_grad_(), randn(50, 4, seed=1)
    clipped_ratio(log_ratios, advantages, low=0.2, high=0.3).sum().backward()
    marks = clip_fraction(log_ratios, advantages, low=0.2, high=0.3)
    assert torch.equal(marks == 1, log_ratios.grad == 0)
    assert 0.1 < float(marks.mean()) < 0.9
    assert not marks.requires_grad


def test_effective_sample_size_is_the_definition_and_adds_up():
    log_weights, mask = randn(6, 5), randn(6, 5, seed=1) > 0
    weights = [math.exp(x) for x in log_weights[mask].tolist()]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    whole = weight_moments(log_weights, mask)
    assert float(effective_sample_size(whole)) == pytest.approx(expected, rel=1e-12)
    parts = weight_moments(log_weights[:2], mask[:2]) + weight_moments(log_weights[2:], mask[2:])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    one_of_many = torch.tensor([0.0] + [-200.0] * 9)
    assert float(effective_sample_size(weight_moments(one_of_many, torch.ones(10).bool()))) == pytest.approx(0.1)


def test_kept_mass_is_the_mass_of_the_support():
    logits = randn(30, 9)
    full, support = logits.log_softmax(-1), logits[:, :4].log_softmax(-1)
    for chosen in range(4):
        kept = kept_mass(full[:, chosen], support[:, chosen])
        torch.testing.assert_close(kept, logits.softmax(-1)[:, :4].sum(-1), rtol=1e-12, atol=0)


def test_score_variance_is_the_trace_of_the_covariance():
    logits, mask = randn(2, 3, 5), randn(2, 3, 5, seed=1) > -0.5
    mask[..., 0] = True
    result = score_variance(logits.masked_fill(~mask, torch.nan), mask)
    for b in range(2):
        for t in range(3):
            p = logits[b, t][mask[b, t]].softmax(0)
            covariance = torch.diag(p) - torch.outer(p, p)
            trace = sum(float(covariance[i, i]) for i in range(len(p)))
            assert float(result[b, t]) == pytest.approx(trace, rel=1e-10, abs=1e-14)


def test_a_top_k_softmax_never_has_the_larger_variance():  # core specification, 2.7 invariant 10
    logits = randn(1, 500, 20) * torch.linspace(0.1, 4, 500).view(1, 500, 1).double()
    full = score_variance(logits)
    for k in (1, 2, 5, 19):
        assert (score_variance(logits.topk(k, -1).values) <= full + 1e-12).all()


def test_messages_name_the_argument():
    with pytest.raises(TypeError, match="`mask` must be bool"):
        weight_moments(randn(3), randn(3))
    with pytest.raises(ValueError, match=r"`advantages_BU` must have shape \[B=2, U=3\]"):
        clip_fraction(randn(2, 3), randn(2, 2), low=0.2, high=0.2)
    with pytest.raises(ValueError, match="`support_logprobs` must have the shape of `logprobs`"):
        kept_mass(randn(3), randn(2))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.6])
def test_a_clip_stops_what_has_gone_further(epsilon):
    log_ratios, advantages = randn(40, 5) / 2, randn(40, 5, seed=1)
    advantages[:, 0] = 0
    stopped = clip_distance(log_ratios, advantages) > epsilon
    assert torch.equal(stopped, clip_fraction(log_ratios, advantages, low=epsilon, high=epsilon) == 1)


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
    repeated = clustered_mean(10 * totals, 10 * counts)  # more tokens of the same prompts tell nothing new
    assert repeated == pytest.approx((mean, error))
    assert math.isnan(clustered_mean(torch.zeros(2), torch.zeros(2))[0])
    assert math.isnan(clustered_mean(totals[:1], counts[:1])[1])


@pytest.mark.parametrize("few", [lambda: signal_and_noise(1.0, 1.0, 1), lambda: jackknife_error([1.0])])
def test_spread_needs_two(few):
    with pytest.raises(ValueError, match="at least 2"):
        few()


def test_overlap_is_that_of_plain_sets():
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(5, 7, 12, generator=generator).argsort(-1)[..., :4]
    today = torch.rand(5, 7, 12, generator=generator).argsort(-1)[..., :4]
    slots = torch.rand(5, 7, 4, generator=generator) < 0.6
    for held in (None, slots):
        overlap = support_overlap(support, today, held)
        for b in range(5):
            for t in range(7):
                chosen = support[b, t] if held is None else support[b, t][held[b, t]]
                same = set(chosen.tolist()) & set(today[b, t][: len(chosen)].tolist())
                assert overlap[b, t].item() == pytest.approx(len(same) / max(len(chosen), 1))


def test_a_response_could_stop_if_some_step_held_an_end():
    support = torch.tensor([[[1, 5], [6, 7]], [[4, 5], [6, 9]], [[4, 5], [6, 7]], [[4, 9], [6, 7]]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    ended = torch.tensor([False, False, True, False])
    assert could_not_stop(support, None, mask, ended, [1, 9]).tolist() == [False, True, False, False]
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[3, 0, 1] = False
    assert could_not_stop(support, slots, mask, ended, [1, 9]).tolist() == [False, True, False, True]
