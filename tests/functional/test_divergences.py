"""Estimators against exact sums over a small vocabulary."""

import math

import pytest
import torch

from lightning_mpo.functional.divergences import exact_on_support, k1, k2, k3, response_k2


def categorical(seed=0, v=7):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(v, generator=g, dtype=torch.float64) for _ in range(2))


def loop_kl(logits, reference):
    total, other = (sum(math.exp(x) for x in z) for z in (logits, reference))
    p, q = [math.exp(x) / total for x in logits], [math.exp(x) / other for x in reference]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_estimators_are_their_formulas():
    lp, ref = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]
    a, b = torch.tensor(lp).double(), torch.tensor(ref).double()
    d = [x - y for x, y in zip(lp, ref, strict=True)]
    assert k1(a, b).tolist() == pytest.approx(d)
    assert k2(a, b).tolist() == pytest.approx([x * x / 2 for x in d])
    assert k3(a, b).tolist() == pytest.approx([math.exp(-x) + x - 1 for x in d])


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():  # docs/algorithms.md 16.4, invariant 5
    logits, reference = categorical()
    lp, ref = logits.log_softmax(0), reference.log_softmax(0)
    exact = loop_kl(logits.tolist(), reference.tolist())
    for estimator in (k1, k3):  # the expectation, summed over the whole vocabulary
        assert float((lp.exp() * estimator(lp, ref)).sum()) == pytest.approx(exact, rel=1e-10)
    assert (k3(lp, ref) > 0).all()
    assert (k3(lp, lp) == 0).all()


def test_expected_gradients_of_the_estimators():  # docs/algorithms.md 16.4, invariant 5: k1's is 0
    logits, reference = categorical(1)
    logits.requires_grad_()
    lp, ref = logits.log_softmax(0), reference.log_softmax(0)
    exact = (lp.exp() * (lp - ref)).sum()
    (true,) = torch.autograd.grad(exact, logits, retain_graph=True)
    expected = {}
    for estimator in (k1, k2, k3):
        mean = (
            lp.exp().detach() * estimator(lp, ref)
        ).sum()  # tokens are drawn, so probabilities carry no gradient
        (expected[estimator],) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(expected[k2], true, rtol=1e-10, atol=1e-14)
    assert expected[k1].abs().max() < 1e-14
    assert (expected[k3] - true).abs().max() > 1e-3


def test_absurd_tokens_stay_finite():
    lp = torch.tensor([-500.0, -1.0], requires_grad=True)
    value = k3(lp, torch.tensor([-1.0, -500.0]))
    value.sum().backward()
    assert value.isfinite().all()
    assert lp.grad.isfinite().all()


def support_problem(seed=2):
    g = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 3, 5, generator=g) > 0.4
    mask[..., 0] = True
    mask[1, 2] = False  # a position without any slot
    return logits, reference, mask


def test_exact_on_support_is_the_definition():
    logits, reference, mask = support_problem()
    bad = logits.masked_fill(~mask, torch.nan), reference.masked_fill(~mask, torch.inf)
    result = exact_on_support(*bad, mask)
    for b in range(2):
        for t in range(3):
            rows = [x[b, t][mask[b, t]].tolist() for x in (logits, reference)]
            expected = loop_kl(*rows) if rows[0] else 0.0
            assert float(result[b, t]) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    everywhere = exact_on_support(logits, reference)
    assert float(everywhere[0, 0]) == pytest.approx(
        loop_kl(logits[0, 0].tolist(), reference[0, 0].tolist()), rel=1e-10
    )


def test_exact_on_support_has_the_right_gradient():
    logits, reference, mask = support_problem()
    assert torch.autograd.gradcheck(
        lambda a, b: exact_on_support(a, b, mask),
        (logits.requires_grad_(), reference.requires_grad_()),
    )
    (grad,) = torch.autograd.grad(exact_on_support(logits, reference, mask).sum(), logits)
    assert (grad[~mask] == 0).all()


def test_exact_on_support_does_not_care_for_constants_or_order():
    logits, reference, mask = support_problem()
    before = exact_on_support(logits, reference, mask)
    order = torch.tensor([4, 1, 3, 0, 2])
    after = exact_on_support(
        (logits + 5)[..., order], (reference - 3)[..., order], mask[..., order]
    )
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-14)
    assert (exact_on_support(logits, logits + 1, mask).abs() < 1e-14).all()


def test_messages_name_the_argument():
    with pytest.raises(
        ValueError,
        match=r"`reference_logprobs` must have the shape of `logprobs`, \[2\], got \[3\]",
    ):
        k3(torch.zeros(2), torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"`reference_logits_BTK` must have shape \[B=1, T=1, K=2\]"
    ):
        exact_on_support(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))


@pytest.mark.parametrize("gap", [-19.0, -21.0, -60.0, -500.0])
def test_k3_pushes_no_token_down_that_is_too_unlikely_already(gap):
    """Beyond the bound the gradient is 0; k1 alone would be left, which has the other sign."""
    logprobs = torch.tensor([-1.0 + gap], requires_grad=True)
    k3(logprobs, torch.tensor([-1.0])).sum().backward()
    assert torch.isfinite(logprobs.grad).all()
    assert logprobs.grad < 0 if gap > -20 else logprobs.grad == 0


def test_k2_of_responses_squares_the_sum_and_divides_by_the_length():
    logprobs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    logprobs = logprobs.masked_fill(~mask, math.nan).requires_grad_()
    values = response_k2(logprobs, reference, mask)
    for b in range(3):
        places = mask[b].nonzero()[:, 0].tolist()
        difference = sum(float(logprobs[b, t] - reference[b, t]) for t in places)
        expected = difference**2 / (2 * len(places)) if places else 0.0
        assert values[b][mask[b]].tolist() == pytest.approx([expected] * len(places))
        # the mean over tokens has the gradient (E - E_ref) / L at each of them
        if places:
            loss = values[b][mask[b]].mean()
            gradient = torch.autograd.grad(loss, logprobs, retain_graph=True)[0][b]
            assert gradient[mask[b]].tolist() == pytest.approx(
                [difference / len(places)] * len(places)
            )
    assert (values[~mask] == 0).all()
    assert (values >= 0).all()


def test_k2_of_equal_responses_is_zero():
    logprobs, mask = torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool)
    assert (response_k2(logprobs, logprobs, mask) == 0).all()
