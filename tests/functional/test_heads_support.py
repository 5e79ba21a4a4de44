"""The support head: a softmax over the stored ids of each position."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.support.head_options import full_logprobs, support_logits, support_logprobs
from tests.support.heads import FORMS, B, K, T, V, dense, loop_logits, loop_score, problem


@pytest.mark.parametrize("form", FORMS)
def test_support_head_is_the_definition(form):
    hidden, weight, bias, tokens, support, mask = problem(seed=7)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :, 0] = support[0, :, 0] == tokens[0]
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
    logits = support_logits(hidden, weight, support, **options)
    logprobs, entropy = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, **options
    )
    for b, t in mask.nonzero().tolist():
        z = loop_logits(hidden[b, t], weight, bias, **form)
        ids = [int(v) for v, in_set in zip(support[b, t], slots[b, t], strict=True) if in_set]
        expected, expected_entropy = loop_score(z, int(tokens[b, t]), ids)
        assert logits[b, t].tolist() == pytest.approx([z[v] for v in support[b, t]], rel=1e-12)
        assert float(logprobs[b, t]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert float(entropy[b, t]) == pytest.approx(expected_entropy, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "bias", "hidden weight bias"])
def test_support_head_gradient_is_that_of_finite_differences(form, trained):
    hidden, weight, bias, tokens, support, mask = problem(seed=8)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :, 0] = support[0, :, 0] == tokens[0]
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trained.split())

    def outputs(hidden, weight, bias):
        options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
        scores = support_logprobs(
            hidden, weight, tokens, support, support_mask_BTK=slots, entropy_grad=True, **options
        )
        return *scores, support_logits(hidden, weight, support, **options)

    assert gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("form", FORMS)
def test_logits_come_along_if_asked_for(form):
    hidden, weight, bias, tokens, support, mask = problem(seed=16)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[:, :, 0] = support[:, :, 0] == tokens
    assert not slots.all()
    dirty = torch.where(slots, support, 10**6)  # ids outside the vocabulary in slots that hold none
    options = {"mask_BT": mask, "bias_V": bias, "support_mask_BTK": slots, "chunk_size": 3, **form}
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    plain = support_logprobs(hidden, weight, tokens, dirty, **options)
    *scores, logits = support_logprobs(hidden, weight, tokens, dirty, return_logits=True, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain, scores, strict=True))
    counts = mask.unsqueeze(-1) & slots
    expected = dense(hidden, weight, bias, **form).gather(-1, support) * counts
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=0)
    upstream = torch.randn(
        logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    leaves = (hidden, weight, bias)
    grads = torch.autograd.grad((logits * upstream).sum(), leaves)
    for one, other in zip(
        grads, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_probabilities_sum_to_one_over_the_support():
    hidden, weight, _, _, support, _ = problem()
    total = sum(
        support_logprobs(hidden, weight, support[..., k], support, temperature=0.5)[0].exp()
        for k in range(K)
    )
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


def test_a_support_of_everything_is_the_full_softmax():
    hidden, weight, bias, tokens, _, _ = problem()
    everything = torch.arange(V).expand(B, T, V)
    options = {"bias_V": bias, "temperature": 0.8, "softcap": 2.0, "entropy_grad": True}
    results = []
    for head in (
        lambda h: full_logprobs(h, weight, tokens, **options),
        lambda h: support_logprobs(h, weight, tokens, everything, **options),
    ):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = head(leaf)
        (logprobs.sin() + entropy.cos()).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gather_form_equals_the_dense_masked_form():
    hidden, weight, bias, tokens, support, mask = problem(seed=10)
    results = []
    for is_dense in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if is_dense:
            logits = dense(*leaves, temperature=0.7)
            outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, support, False)
            logprobs = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
            logprobs = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask
        else:
            logprobs, _ = support_logprobs(
                leaves[0],
                leaves[1],
                tokens,
                support,
                bias_V=leaves[2],
                mask_BT=mask,
                temperature=0.7,
            )
        (logprobs.sin()).sum().backward()
        results.append([logprobs.detach(), *(x.grad for x in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_logits_outside_the_support_are_free():
    hidden, weight, bias, tokens, support, _ = problem(seed=11)
    support = support[:1, :1].expand(B, T, K).contiguous()
    tokens = support[..., 1].contiguous()
    inside = torch.zeros(V, dtype=torch.bool).scatter(0, support[0, 0], True)
    before = support_logprobs(hidden, weight, tokens, support, bias_V=bias)
    weight2, bias2 = weight.clone(), bias + 3.0  # a constant on all logits
    weight2[~inside], bias2[~inside] = 50.0, -7.0  # anything on the others
    after = support_logprobs(hidden, weight2, tokens, support, bias_V=bias2)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    leaf = bias.clone().requires_grad_()
    support_logprobs(hidden, weight, tokens, support, bias_V=leaf)[0].sum().backward()
    assert (leaf.grad[~inside] == 0).all()
    assert abs(float(leaf.grad.sum())) < 1e-12
    assert leaf.grad[inside].abs().min() > 1e-3


def test_on_policy_ratio_is_one_and_the_classic_bug_gives_the_kept_mass():
    hidden, weight, _, tokens, support, _ = problem(seed=12)
    behaviour = support_logprobs(hidden, weight, tokens, support)[0]
    assert torch.equal(
        (support_logprobs(hidden, weight, tokens, support)[0] - behaviour).exp(), torch.ones(B, T)
    )
    ratio = (full_logprobs(hidden, weight, tokens)[0] - behaviour).exp()
    kept = dense(hidden, weight).softmax(-1).gather(-1, support).sum(-1)
    torch.testing.assert_close(ratio, kept, rtol=1e-12, atol=0)
    assert kept.max() < 0.99


def test_order_of_a_support_and_empty_slots_change_nothing():
    hidden, weight, _, tokens, support, _ = problem(seed=13)
    before = support_logprobs(hidden, weight, tokens, support)
    order = torch.rand(B, T, K).argsort(-1)
    padding = torch.full((B, T, 2), -1)
    padding[..., 1] = support[..., 0]  # a valid id in an empty slot has no mass either
    padded = torch.cat([support.gather(-1, order), padding], -1)
    slots = torch.ones_like(padded, dtype=torch.bool)
    slots[..., -2:] = False
    after = support_logprobs(hidden, weight, tokens, padded, support_mask_BTK=slots)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_support_of_one_token_has_no_entropy_and_no_nan():
    hidden, weight, _, tokens, support, _ = problem()
    hidden.requires_grad_()
    slots = support == tokens.unsqueeze(-1)
    logprobs, entropy = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, entropy_grad=True
    )
    (logprobs + entropy).sum().backward()
    assert torch.equal(logprobs, torch.zeros(B, T))
    assert torch.equal(entropy, torch.zeros(B, T))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_tokens_outside_their_support_are_counted():
    hidden, weight, _, tokens, support, mask = problem()
    mask[:] = True
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :2] = support[0, :2] != tokens[0, :2].unsqueeze(-1)
    with pytest.raises(
        ValueError, match=r"`tokens_BT` must be in `support_BTK` .* got 2 of 8 tokens outside"
    ):
        support_logprobs(hidden, weight, tokens, support, support_mask_BTK=slots)
    mask[0, :2] = False
    logprobs, _ = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, mask_BT=mask
    )
    assert (logprobs[mask] < 0).all()
