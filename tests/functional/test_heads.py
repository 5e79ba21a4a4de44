"""The full head: values, gradients, ranks and memory; and properties of both heads."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.support.head_options import full_logprobs, support_logprobs
from tests.support.heads import FORMS, B, K, T, V, dense, loop_logits, loop_score, problem


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_full_head_is_the_definition(form, with_bias):
    hidden, weight, bias, tokens, support, mask = problem()
    bias = bias if with_bias else None
    logprobs, entropy, candidates = full_logprobs(
        hidden,
        weight,
        tokens,
        mask_BT=mask,
        bias_V=bias,
        candidates_BTK=support,
        chunk_size=3,
        **form,
    )
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                assert logprobs[b, t] == 0
                assert entropy[b, t] == 0
                assert (candidates[b, t] == 0).all()
                continue
            z = loop_logits(hidden[b, t], weight, bias, **form)
            expected, expected_entropy = loop_score(z, int(tokens[b, t]), range(V))
            assert float(logprobs[b, t]) == pytest.approx(expected, rel=1e-12)
            assert float(entropy[b, t]) == pytest.approx(expected_entropy, rel=1e-12)
            for k in range(K):
                expected, _ = loop_score(z, int(support[b, t, k]), range(V))
                assert float(candidates[b, t, k]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "trained", ["hidden", "hidden weight", "hidden bias", "hidden weight bias", "weight"]
)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_full_head_gradient_is_that_of_finite_differences(form, trained, entropy_grad):
    hidden, weight, bias, tokens, support, mask = problem(seed=1)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trained.split())

    def outputs(hidden, weight, bias):
        out = full_logprobs(
            hidden,
            weight,
            tokens,
            mask_BT=mask,
            bias_V=bias,
            candidates_BTK=support,
            entropy_grad=entropy_grad,
            chunk_size=3,
            **form,
        )
        return out if entropy_grad else (out[0], out[2])

    assert gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_frozen_and_trained_heads_give_the_same_gradient(entropy_grad):
    hidden, weight, _, tokens, support, mask = problem(seed=2)
    grads = []
    for trained in (False, True):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(trained)
        logprobs, entropy, candidates = full_logprobs(
            leaf,
            head,
            tokens,
            mask_BT=mask,
            softcap=2.0,
            candidates_BTK=support,
            entropy_grad=entropy_grad,
        )
        (
            logprobs.sin().sum()
            + candidates.cos().sum()
            + (entropy.square().sum() if entropy_grad else 0)
        ).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_full_head_gradient_is_that_of_a_dense_log_softmax():
    hidden, weight, bias, tokens, _, mask = problem(seed=3)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    others = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (
        full_logprobs(leaves[0], leaves[1], tokens, mask_BT=mask, bias_V=leaves[2])[0] * upstream
    ).sum().backward()
    reference = dense(*others).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    (reference * upstream * mask).sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_entropy_carries_a_gradient_only_if_asked():
    hidden, weight, _, tokens, support, _ = problem()
    hidden.requires_grad_()
    assert not full_logprobs(hidden, weight, tokens)[1].requires_grad
    assert full_logprobs(hidden, weight, tokens, entropy_grad=True)[1].requires_grad
    assert not support_logprobs(hidden, weight, tokens, support)[1].requires_grad
    assert support_logprobs(hidden, weight, tokens, support, entropy_grad=True)[1].requires_grad
