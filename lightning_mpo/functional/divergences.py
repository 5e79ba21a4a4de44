"""How far two policies are apart: estimators of the KL divergence, its exact value on a support, and the coarse
divergences of a trust region.

k1, k2 and k3 are Schulman's estimators ("Approximating KL Divergence", joschu.net/blog/kl-approx.html), as written in
related-algorithms 0.3: in nats, per token, of KL(policy || reference) for tokens drawn from the policy. The binary and
bucketed divergences are those of DPPO (arXiv:2602.04879), of the policy that sampled from the current one.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same

MAX_EXPONENT = 20.0
"""Exponents are clamped to this size, so that one absurd token cannot overflow a sum."""
CLOSEST_TO_CERTAIN = 1e-7
"""Probabilities count as at least this far from 0 and 1 in logarithms: float32 does not resolve more near 1."""


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL divergence by the log-ratio: unbiased, may be negative.

        k1 = log π(o) - log π_ref(o)                          [CODE, related-algorithms 0.3]

    Its gradient has expectation zero: use it in a reward, never in a loss.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        Estimates in nats, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    same(logprobs=logprobs, reference_logprobs=reference_logprobs)
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL divergence by half the squared log-ratio: biased, but its gradient is the KL's in expectation.

        k2 = (log π(o) - log π_ref(o))² / 2                   [CODE, related-algorithms 0.3; 9.10 invariant 5]

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        Estimates in nats, same shape, never negative.

    Raises:
        ValueError: If the shapes differ.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return 0.5 * k1(logprobs, reference_logprobs) ** 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL divergence by a sum that is unbiased and never negative.

        k3 = exp(-k1) + k1 - 1                                [CODE, related-algorithms 0.3]

    The exponent is clamped to ±20 (verl clamps k3 itself to ±10); the gradient of the exponential is zero beyond.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        Estimates in nats, same shape, never negative.

    Raises:
        ValueError: If the shapes differ.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    log_ratios = k1(logprobs, reference_logprobs)
    return torch.expm1((-log_ratios).clamp(-MAX_EXPONENT, MAX_EXPONENT)) + log_ratios


def exact_on_support(
    logits_BTK: Tensor, reference_logits_BTK: Tensor, support_mask_BTK: Tensor | None = None
) -> Tensor:
    """Sum the KL divergence over a support, both policies renormalised on it.

        KL = Σ_{v∈P} π_P(v) (log π_P(v) - log π_ref,P(v))     (core-algorithms 2.4: both terms on P, never mixed) [I]

    Args:
        logits_BTK: Logits of the policy on the support, temperature applied, shape ``[B, T, K]``.
        reference_logits_BTK: Logits of the reference on the same ids, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that are not in the support, shape ``[B, T, K]``. None: all are.

    Returns:
        Divergences in nats, shape ``[B, T]``; 0 where a position has no slot at all.

    Raises:
        ValueError: If the shapes differ.

    >>> logits, reference = torch.tensor([[[0.0, 0.0, 9.0]]]), torch.tensor([[[0.0, 1.0, -9.0]]])
    >>> exact_on_support(logits, reference, torch.tensor([[[True, True, False]]]))
    tensor([[0.1201]])
    """
    check(logits_BTK=logits_BTK, reference_logits_BTK=reference_logits_BTK, support_mask_BTK=support_mask_BTK)
    if support_mask_BTK is None:
        support_mask_BTK = torch.ones_like(logits_BTK, dtype=torch.bool)
    logprobs = _log_softmax(logits_BTK, support_mask_BTK)
    terms = logprobs.exp() * (logprobs - _log_softmax(reference_logits_BTK, support_mask_BTK))
    return torch.where(support_mask_BTK, terms, 0).sum(-1)


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Take the log-softmax over the slots of the mask; slots outside get 0, which stands for nothing."""
    empty = ~mask.any(-1, keepdim=True)
    return logits.masked_fill(~(mask | empty), -torch.inf).log_softmax(-1).masked_fill(~mask, 0)


def binary_tv(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Measure how far the probability of the sampled token has moved: the total variation of (token, all others).

        D_TV = |μ(o) - π(o)| = μ(o) |r - 1|                   (DPPO Eq. 14-16 [P][C]; core-algorithms 3.1)

    A lower bound of the total variation over the vocabulary.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        behaviour_logprobs: The same under the policy that sampled, same shape.

    Returns:
        Probabilities in [0, 1], same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> binary_tv(torch.tensor([0.8]).log(), torch.tensor([0.99]).log())
    tensor([0.1900])
    """
    same(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    return (logprobs.exp() - behaviour_logprobs.exp()).abs()


def binary_kl(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Measure the KL divergence of (token, all others) from the policy that sampled to the current one.

        D_KL = μ log(μ / π) + (1 - μ) log((1 - μ) / (1 - π))  (DPPO Eq. 14-16 [P][C]; core-algorithms 3.1)

    At least 2 D_TV² (Pinsker), and a lower bound of the divergence over the vocabulary. 1 - e^x is taken through expm1
    and log1p, exact up to probabilities of 1 - 1e-7.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        behaviour_logprobs: The same under the policy that sampled, same shape.

    Returns:
        Divergences in nats, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> binary_kl(torch.tensor([0.8]).log(), torch.tensor([0.99]).log())
    tensor([0.1810])
    """
    same(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    now, then = (x.clamp(max=-CLOSEST_TO_CERTAIN) for x in (logprobs, behaviour_logprobs))
    others = _log1mexp(then)
    return then.exp() * (then - now) + others.exp() * (others - _log1mexp(now))


def bucket_tv(logprobs_K: Tensor, behaviour_logprobs_K: Tensor) -> Tensor:
    """Measure the total variation over some ids and one bucket for all others.

        D_TV = 1/2 Σ_bucket |μ - π|                           (DPPO top-K [P][C]; core-algorithms 3.1)

    Not below :func:`binary_tv` of any of the ids, not above the total variation over the vocabulary.

    Args:
        logprobs_K: Log-probabilities of distinct ids, shape ``[..., K]``, nats; -inf where a slot holds none.
        behaviour_logprobs_K: The same under the policy that sampled, same shape.

    Returns:
        Probabilities in [0, 1], shape ``[...]``.

    Raises:
        ValueError: If the shapes differ.

    >>> bucket_tv(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.6, 0.3]]).log())
    tensor([0.2000])
    """
    same(logprobs_K=logprobs_K, behaviour_logprobs_K=behaviour_logprobs_K)
    now, then = _buckets(logprobs_K), _buckets(behaviour_logprobs_K)
    return (now - then).abs().sum(-1) / 2


def bucket_kl(logprobs_K: Tensor, behaviour_logprobs_K: Tensor) -> Tensor:
    """Measure the KL divergence over some ids and one bucket for all others, from the policy that sampled.

        D_KL = Σ_bucket μ log(μ / π)                          (DPPO top-K [P][C]; core-algorithms 3.1)

    Args:
        logprobs_K: Log-probabilities of distinct ids, shape ``[..., K]``, nats; -inf where a slot holds none.
        behaviour_logprobs_K: The same under the policy that sampled, same shape.

    Returns:
        Divergences in nats, shape ``[...]``; the bucket of the others counts with at least 1e-7 of the mass.

    Raises:
        ValueError: If the shapes differ.

    >>> bucket_kl(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.6, 0.3]]).log())
    tensor([0.1212])
    """
    same(logprobs_K=logprobs_K, behaviour_logprobs_K=behaviour_logprobs_K)
    now, then = (_buckets(x).clamp(min=CLOSEST_TO_CERTAIN) for x in (logprobs_K, behaviour_logprobs_K))
    return (then * (then.log() - now.log())).sum(-1)


def outside_trust_region(
    logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    delta: float | tuple[float, float],
    divergence: Literal["tv", "kl"] = "tv",
    candidate_logprobs_BTK: Tensor | None = None,
    behaviour_candidate_logprobs_BTK: Tensor | None = None,
) -> Tensor:
    """Tell which tokens have moved further than a divergence allows, in the direction that their advantage pushes.

        (A > 0 and r > 1 and D > up)   or   (A < 0 and r < 1 and D > down)   (DPPO Eq. 13 [P][C]; core-algorithms 3.1)

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats.
        behaviour_logprobs_BT: The same as recorded by the sampler, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        delta: Bound on the divergence, above 0; two numbers bound (falling, rising) probabilities.
        divergence: "tv", in probability, or "kl", in nats.
        candidate_logprobs_BTK: Of distinct ids, shape ``[B, T, K]``, -inf in slots without one. None: binary divergence.
        behaviour_candidate_logprobs_BTK: The same under the policy that sampled.

    Returns:
        Bool, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, a bound is not positive, or candidates are given for one policy only.

    >>> moved, mu = torch.tensor([[0.8, 0.01]]).log(), torch.tensor([[0.99, 0.0001]]).log()
    >>> outside_trust_region(moved, mu, torch.tensor([[-1.0, 1.0]]), delta=0.15)
    tensor([[ True, False]])
    """
    check(logprobs_BT=logprobs_BT, behaviour_logprobs_BT=behaviour_logprobs_BT, advantages_BT=advantages_BT)
    down, up = (delta, delta) if isinstance(delta, float | int) else delta
    if not (down > 0 and up > 0):
        raise ValueError(f"`delta` must be above 0, got {delta}")
    if divergence not in ("tv", "kl"):
        raise ValueError(f"`divergence` must be 'tv' or 'kl', got {divergence!r}")
    now, then = logprobs_BT.detach().float(), behaviour_logprobs_BT.detach().float()
    if (candidate_logprobs_BTK is None) != (behaviour_candidate_logprobs_BTK is None):
        raise ValueError("`candidate_logprobs_BTK` and `behaviour_candidate_logprobs_BTK` must be given together")
    if candidate_logprobs_BTK is None or behaviour_candidate_logprobs_BTK is None:
        distance = (binary_tv if divergence == "tv" else binary_kl)(now, then)
    else:
        measure = bucket_tv if divergence == "tv" else bucket_kl
        distance = measure(candidate_logprobs_BTK.detach().float(), behaviour_candidate_logprobs_BTK.detach().float())
    gained = (advantages_BT > 0) & (now > then) & (distance > up)
    return gained | ((advantages_BT < 0) & (now < then) & (distance > down))


def _buckets(logprobs_K: Tensor) -> Tensor:
    """Return probabilities with those of all other ids behind them."""
    probabilities = logprobs_K.exp()
    return torch.cat([probabilities, (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _log1mexp(logprobs: Tensor) -> Tensor:
    """Return log(1 - e^x), x < 0."""
    return torch.where(logprobs > -0.6931, (-logprobs.expm1()).log(), (-logprobs.exp()).log1p())
