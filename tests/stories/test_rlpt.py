"""RLPT: the ten invariants of docs/algorithms.md 16.2, by their numbers, on the head, the sampler's step and the loss.

With the identity as unembedding hidden states are logits, so that gradients of logits can be read off.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.support_diagnostics import score_variance
from lightning_mpo.functional.supports import nucleus, top_k
from lightning_mpo.functional.surrogates import clipped_ratio
from tests.support.builders import seeded
from tests.support.head_options import full_logprobs, support_logits, support_logprobs

B, T, V, K = 4, 5, 12, 4
EYE = torch.eye(V, dtype=torch.float64)


def problem(seed: int = 0, sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, the sampled tokens and the top K they are drawn from."""
    g = seeded(seed)
    logits_BTV = sharp * torch.randn(B, T, V, generator=g, dtype=torch.float64)
    support_BTK = top_k(logits_BTV.flatten(0, 1), K).view(B, T, K)
    slots_BT1 = torch.randint(K, (B, T, 1), generator=g)
    return logits_BTV, support_BTK.long().gather(2, slots_BT1)[..., 0], support_BTK


def masked(logits_BTV: Tensor, tokens_BT: Tensor, support_BTK: Tensor, **options) -> Tensor:
    """Return log-probs of the masked policy, through the head."""
    return support_logprobs(logits_BTV, EYE, tokens_BT, support_BTK, **options)[0]


def test_1_probabilities_sum_to_one_over_the_support_and_there_is_none_outside():
    logits, _, support = problem()
    total = sum(masked(logits, support[..., slot].long(), support).exp() for slot in range(K))
    torch.testing.assert_close(total, torch.ones(B, T, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be in `support_BTK`"):
        masked(logits, (support.amax(-1) + 1).long() % V, support[..., :1])


def test_2_a_support_of_everything_is_the_full_softmax():
    logits, tokens, _ = problem()
    everything = torch.arange(V, dtype=torch.int32).expand(B, T, V)
    torch.testing.assert_close(
        masked(logits, tokens, everything), full_logprobs(logits, EYE, tokens)[0]
    )


def test_3_on_policy_the_ratio_is_exactly_one():
    logits, tokens, support = problem()
    old, new = masked(logits, tokens, support), masked(logits.clone(), tokens, support)
    assert torch.equal((new - old).exp(), torch.ones(B, T, dtype=torch.float64))


def test_4_constants_inside_and_anything_outside_leave_logprobs_and_ratios_alone():
    logits, tokens, support = problem()
    other = logits + 0.3 * torch.randn(B, T, V, generator=seeded(3), dtype=torch.float64)
    moved = 50 * torch.randn(B, T, V, generator=seeded(4), dtype=torch.float64)
    inside = torch.zeros(B, T, V, dtype=torch.bool).scatter(2, support.long(), True)
    shifted = torch.where(inside, logits + 7.0, moved)
    torch.testing.assert_close(masked(shifted, tokens, support), masked(logits, tokens, support))
    ratio = masked(other, tokens, support) - masked(logits, tokens, support)
    torch.testing.assert_close(
        masked(other, tokens, support) - masked(shifted, tokens, support), ratio
    )


def test_5_the_gradient_of_logits_is_the_score_inside_and_zero_outside():
    logits, tokens, support = problem()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(masked(logits, tokens, support).sum(), logits)
    inside = torch.zeros(B, T, V, dtype=torch.bool).scatter(2, support.long(), True)
    probabilities = logits.detach().masked_fill(~inside, -torch.inf).softmax(-1)
    torch.testing.assert_close(gradient, torch.nn.functional.one_hot(tokens, V) - probabilities)
    assert not gradient[~inside].any()
    assert gradient.sum(-1).abs().max() < 1e-12
    now = masked(
        logits, tokens, support
    )  # and so is that of the clipped surrogate, to a factor per token
    advantages = torch.randn(B, T, generator=seeded(5), dtype=torch.float64)
    losses = clipped_ratio(now - now.detach(), advantages, low=0.2, high=0.2)
    (through,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(through, -advantages[..., None] * gradient)


def test_6_the_gather_form_is_the_dense_masked_form():
    logits, tokens, support = problem()
    inside = torch.zeros(B, T, V, dtype=torch.bool).scatter(2, support.long(), True)
    dense = (
        (logits / 0.7)
        .masked_fill(~inside, -torch.inf)
        .log_softmax(-1)
        .gather(2, tokens[..., None])[..., 0]
    )
    torch.testing.assert_close(masked(logits, tokens, support, temperature=0.7), dense)


def test_7_the_classic_bug_gives_the_kept_mass_as_ratio():
    """A full-vocabulary numerator over a truncated denominator, as where a trainer ignores the sampler's truncation."""
    logits, tokens, support = problem()
    mass = logits.softmax(-1).gather(2, support.long()).sum(-1)
    bug = full_logprobs(logits, EYE, tokens)[0] - masked(logits, tokens, support)
    torch.testing.assert_close(bug.exp(), mass)
    assert mass.max() < 0.999  # so that the bug would show
    assert torch.equal(
        masked(logits, tokens, support) - masked(logits, tokens, support), torch.zeros_like(bug)
    )


def test_8_order_of_a_stored_support_changes_nothing():
    logits, tokens, support = problem()
    order = torch.rand(B, T, K, generator=seeded(6)).argsort(-1)
    torch.testing.assert_close(
        masked(logits, tokens, support.gather(2, order)),
        masked(logits, tokens, support),
        rtol=1e-12,
        atol=1e-12,
    )


def test_9_slots_that_hold_no_id_have_no_mass_whatever_they_say():
    logits, _, _ = problem()
    ids, slots = (part.view(B, T, 6) for part in nucleus(logits.flatten(0, 1), 0.8, 6))
    assert not slots.all()
    tokens = ids[..., 0].long()
    values = masked(logits, tokens, ids, support_mask_BTK=slots)
    twice = torch.where(slots, ids, ids[..., :1])  # valid ids, the sampled token even
    torch.testing.assert_close(masked(logits, tokens, twice, support_mask_BTK=slots), values)
    wild = torch.where(slots, ids, 10**6)
    torch.testing.assert_close(masked(logits, tokens, wild, support_mask_BTK=slots), values)
    total = torch.where(slots, logits.gather(2, ids.long()), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(values, logits.gather(2, tokens[..., None])[..., 0] - total)


@pytest.mark.parametrize("k", [1, 2, 4, 11])
@pytest.mark.parametrize("sharp", [0.0, 0.5, 2.0, 8.0])
def test_10_restriction_to_the_top_k_never_raises_the_variance_of_the_score(k, sharp):
    """1 - |p_M|^2 <= 1 - |p|^2: ours, not the authors' theorem."""
    logits, _, _ = problem(seed=k, sharp=sharp)
    support = top_k(logits.flatten(0, 1), k).view(B, T, k)
    restricted = score_variance(support_logits(logits, EYE, support))
    assert (restricted <= score_variance(logits) + 1e-12).all()
