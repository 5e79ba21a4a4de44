"""How far two policies are apart: estimators of the KL divergence, and its exact value on a
support.

k1, k2 and k3 are Schulman's estimators ("Approximating KL Divergence",
joschu.net/blog/kl-approx.html), in nats, per token, of KL(policy || reference) for tokens drawn
from the policy (docs/algorithms.md 8.1).
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same

MAX_EXPONENT = 20.0
"""A log-ratio is taken as at least minus this, so that one absurd token cannot overflow a sum."""


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL divergence by the log-ratio: unbiased, may be negative.

        k1 = log π(o) - log π_ref(o)   ([C, TRL and verl]; docs/algorithms.md 8.1)

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
    """Estimate the KL divergence by half the squared log-ratio: biased, but its gradient is the
    KL's in expectation.

        k2 = (log π(o) - log π_ref(o))² / 2
                                   ([C, TRL and verl]; docs/algorithms.md 8.1 and 16.4, invariant 5)

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


def response_k2(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Estimate the divergence of whole responses by half the squared difference of their log-probs.

        k2 = (Σ_t (log π(o_t) - log π_ref(o_t)))² / (2 L)     per token of a response
                                                                  (ESPO [C]; docs/algorithms.md 8.1)

    The sum is squared before it is divided by the length L.

    Args:
        logprobs_BT: Log-probabilities of the tokens, or terms of an ELBO, shape ``[B, T]``, nats.
        reference_logprobs_BT: The same under the reference.
        mask_BT: Tokens of the response, shape ``[B, T]``.

    Returns:
        The same value at each token of a response, 0 elsewhere, shape ``[B, T]``, nats.

    Raises:
        ValueError: If the shapes differ.

    >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> response_k2(logprobs, torch.tensor([[-1.5, -2.5]]), mask)
    tensor([[0.2500, 0.2500]])
    """
    check(logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT, mask_BT=mask_BT)
    differences_BT = torch.where(mask_BT, logprobs_BT - reference_logprobs_BT, 0.0)
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    return 0.5 * differences_BT.sum(1, keepdim=True) ** 2 / length_B1 * mask_BT


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate the KL divergence by a sum that is unbiased and never negative.

        k3 = exp(-k1) + k1 - 1   ([C, TRL and verl]; docs/algorithms.md 8.1)

    A log-ratio under -20 counts as -20 and has no gradient: beyond, the exponential overflows, and
    k1 alone would push a token that is far too unlikely further down. verl clamps the log-ratio to
    ±20 and k3 to ±10 [C].

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
    log_ratios = k1(logprobs, reference_logprobs).clamp(min=-MAX_EXPONENT)
    return torch.expm1(-log_ratios) + log_ratios


def exact_on_support(
    logits_BTK: Tensor, reference_logits_BTK: Tensor, support_mask_BTK: Tensor | None = None
) -> Tensor:
    """Sum the KL divergence over a support, both policies renormalised on it.

        KL = Σ_{v∈P} π_P(v) (log π_P(v) - log π_ref,P(v))
                                          (both terms on P, never mixed [I]; docs/algorithms.md 8.2)

    Args:
        logits_BTK: Logits of the policy on the support, temperature applied, shape ``[B, T, K]``.
        reference_logits_BTK: Logits of the reference on the same ids, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that are not in the support, shape ``[B, T, K]``. None:
            all are.

    Returns:
        Divergences in nats, shape ``[B, T]``; 0 where a position has no slot at all.

    Raises:
        ValueError: If the shapes differ.

    >>> logits, reference = torch.tensor([[[0.0, 0.0, 9.0]]]), torch.tensor([[[0.0, 1.0, -9.0]]])
    >>> exact_on_support(logits, reference, torch.tensor([[[True, True, False]]]))
    tensor([[0.1201]])
    """
    check(
        logits_BTK=logits_BTK,
        reference_logits_BTK=reference_logits_BTK,
        support_mask_BTK=support_mask_BTK,
    )
    if support_mask_BTK is None:
        support_mask_BTK = torch.ones_like(logits_BTK, dtype=torch.bool)
    logprobs = _log_softmax(logits_BTK, support_mask_BTK)
    terms = logprobs.exp() * (logprobs - _log_softmax(reference_logits_BTK, support_mask_BTK))
    return torch.where(support_mask_BTK, terms, 0).sum(-1)


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Take the log-softmax over the slots of the mask; slots outside get 0, which stands for
    nothing.
    """
    empty = ~mask.any(-1, keepdim=True)
    return logits.masked_fill(~(mask | empty), -torch.inf).log_softmax(-1).masked_fill(~mask, 0)
