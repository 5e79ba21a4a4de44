"""Diagnostics of supports against sets, loops and plain softmaxes."""

import pytest
import torch

from lightning_mpo.functional.support_diagnostics import (
    could_not_stop,
    kept_mass,
    score_variance,
    support_overlap,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_a_top_k_softmax_never_has_the_larger_variance():  # docs/algorithms.md 16.2, invariant 10
    logits = randn(1, 500, 20) * torch.linspace(0.1, 4, 500).view(1, 500, 1).double()
    full = score_variance(logits)
    for k in (1, 2, 5, 19):
        assert (score_variance(logits.topk(k, -1).values) <= full + 1e-12).all()


def test_messages_name_the_argument():
    with pytest.raises(ValueError, match="`support_logprobs` must have the shape of `logprobs`"):
        kept_mass(randn(3), randn(2))


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
    assert could_not_stop(support, None, mask, ended, [1, 9]).tolist() == [
        False,
        True,
        False,
        False,
    ]
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[3, 0, 1] = False
    assert could_not_stop(support, slots, mask, ended, [1, 9]).tolist() == [
        False,
        True,
        False,
        True,
    ]
