"""From a log-ratio and an advantage to the loss of one action: how far may the policy move?

PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with the clip-higher of DAPO
(arXiv:2503.14476) and the dual clip (Ye et al. 2020, arXiv:1912.09729). An action is whatever the
log-ratio was taken over: a token gives GRPO and DAPO, a block MPO, a sequence GSPO. All losses are
unreduced, to be minimised (docs/algorithms.md 5).
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same
from lightning_mpo.functional.trust_regions import outside_clip, outside_trust_region

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this size before they are exponentiated, as in verl [C]
(docs/algorithms.md 5).
"""


def safe_ratio(log_ratios: Tensor) -> Tensor:
    """Exponentiate log-ratios, clamped to ±20 so that neither ratio nor gradient overflows.

        r = exp(clamp(log r, -20, 20))                        ([C, verl]; docs/algorithms.md 5)

    Args:
        log_ratios: Summed log-ratios of actions, any shape, nats.

    Returns:
        Ratios, same shape; no gradient outside ±20.

    >>> safe_ratio(torch.tensor([0.0, float("inf")]))
    tensor([1.0000e+00, 4.8517e+08])
    """
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_gradient(log_ratios_BU: Tensor, advantages_BU: Tensor) -> Tensor:
    """Take the policy gradient without any importance weight.

        loss = -A log r,   d loss / d log π = -A              (REINFORCE, Williams 1992)

    Exact for the update on the policy that sampled; biased for every later one.

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats. Carries the gradient.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.

    Returns:
        Losses, shape ``[B, U]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If the shapes differ.

    >>> policy_gradient(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    tensor([[-1.]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU)
    return -advantages_BU * log_ratios_BU


def clipped_ratio(
    log_ratios_BU: Tensor,
    advantages_BU: Tensor,
    *,
    low: float,
    high: float,
    dual: float | None = None,
) -> Tensor:
    """Clip the ratio of an action, so that an update earns nothing beyond the trust region.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A)
                                                 (PPO Eq. 7; MPO Eq. 13 [I]; docs/algorithms.md 5.2)
        loss = min(loss, -dual A)   where A < 0   (dual clip [C, verl]; docs/algorithms.md 5.2)

    The gradient with respect to log r is ``-M r A``, M = 0 where :func:`outside_clip` holds, else 1.

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats. Carries the gradient.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.
        low: How far the ratio may fall below 1, in [0, 1).
        high: How far the ratio may rise above 1, at least 0.
        dual: Largest ratio of an action with a negative advantage, above 1. None: no dual clip.

    Returns:
        Losses, shape ``[B, U]``.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> log_ratios = torch.log(torch.tensor([[1.0, 1.5, 1.5]]))
    >>> clipped_ratio(log_ratios, torch.tensor([[1.0, 1.0, -1.0]]), low=0.2, high=0.2)
    tensor([[-1.0000, -1.2000,  1.5000]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU)
    _check_clip(low, high)
    if dual is not None and not dual > 1:
        raise ValueError(f"`dual` must be above 1, got {dual}")
    ratios = safe_ratio(log_ratios_BU)
    losses = torch.maximum(
        -ratios * advantages_BU, -ratios.clamp(1 - low, 1 + high) * advantages_BU
    )
    if dual is None:
        return losses
    return torch.where((advantages_BU < 0) & (ratios > dual), -dual * advantages_BU, losses)


def clipped_weight(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, low: float, high: float
) -> Tensor:
    """Clip the importance weight and not the gradient, so that every token goes on learning.

        loss = -sg(clip(r, 1 - low, 1 + high)) A log π(o)
                                         (CISPO, arXiv:2506.13585 [C, verl]; docs/algorithms.md 5.3)

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats. Carries the gradient.
        old_logprobs_BT: The same at rollout weights, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        low: How far the weight may fall below 1, in (0, 1]; 1: any (MiniMax-M1, TRL).
        high: How far the weight may rise above 1, above 0.

    Returns:
        Losses, shape ``[B, T]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> now, old, gain = (torch.tensor([[x]]) for x in (-1.0, -2.0, 1.0))
    >>> clipped_weight(now, old, gain, low=0.2, high=0.5)
    tensor([[1.5000]])
    """
    check(logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT)
    if not 0 < low <= 1:
        raise ValueError(f"`low` must be in (0, 1], got {low}")
    if not high > 0:
        raise ValueError(f"`high` must be above 0, got {high}")
    weights = safe_ratio(logprobs_BT.detach() - old_logprobs_BT.detach()).clamp(1 - low, 1 + high)
    return -weights * advantages_BT * logprobs_BT


def asymmetric_ratio(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    low: float | Tensor,
    high: float | Tensor,
    cap_positive: float,
    cap_negative: float,
) -> Tensor:
    """Weigh good tokens with the inverse ratio, so that the unlikely ones learn most, and bad ones
    with the ratio.

        loss = -sg(M w) A log π(o),  w = min(1/r, cap_positive) if A >= 0, else min(r, cap_negative)
                                     (ASPO, arXiv:2510.06062 Eq. 3 [P, C]; docs/algorithms.md 5.4)

    M = 0 if A > 0 and r > 1 + high, or if A < 0 and r < 1 - low; else M = 1. The caps weigh, they
    stop no gradient.

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats. Carries the gradient.
        old_logprobs_BT: The same at rollout weights, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        low: How far the ratio of a bad token may fall below 1, in (0, 1); one number, or one per
            token, ``[B, T]``.
        high: How far the ratio of a good token may rise above 1, above 0; likewise.
        cap_positive: Largest weight of a good token, at least 1 (3 in the released code [C]).
        cap_negative: Largest weight of a bad token, at least 1 (3 in the released code [C]).

    Returns:
        Losses, shape ``[B, T]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> options = {"low": 0.2, "high": 0.2, "cap_positive": 3.0, "cap_negative": 3.0}
    >>> old = torch.log(torch.tensor([[0.8, 0.8]]))
    >>> now = torch.log(torch.tensor([[0.4, 0.4]]))
    >>> asymmetric_ratio(now, old, torch.tensor([[1.0, -1.0]]), **options)
    tensor([[1.8326, -0.0000]])
    """
    check(logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT)
    _check_clip(low, high)
    for name, cap in (("cap_positive", cap_positive), ("cap_negative", cap_negative)):
        if not cap >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {cap}")
    log_ratios = logprobs_BT.detach() - old_logprobs_BT.detach()
    ratios, inverses = safe_ratio(log_ratios), safe_ratio(-log_ratios)
    bounded = torch.where(
        advantages_BT < 0, ratios.clamp(max=cap_negative), inverses.clamp(max=cap_positive)
    )
    inside = ~outside_clip(ratios, advantages_BT, low=low, high=high)
    return -(bounded * inside) * advantages_BT * logprobs_BT


def bounded_log_ratios(
    log_ratios: Tensor, advantages: Tensor, *, low: float, high: float
) -> Tensor:
    """Bound the log-ratio of each token on the side where the objective would grow, before tokens
    are averaged.

        ell' = min(ell, high) where A > 0,   max(ell, -low) where A < 0
                                                            (GMPO [C, verl]; docs/algorithms.md 5.5)

    The exponential of their mean is GMPO's ratio (arXiv:2507.20673), a geometric mean of clipped
    ratios. Bounds are in nats: e^-0.4 to e^0.4 is the paper's range [REC].

    Args:
        log_ratios: Log-ratios of tokens, any shape, nats. Carries the gradient.
        advantages: Their advantages, same shape.
        low: Bound from below where the advantage is negative, nats, above 0.
        high: Bound from above where the advantage is positive, nats, above 0.

    Returns:
        Bounded log-ratios, same shape; no gradient beyond a bound.

    Raises:
        ValueError: If shapes differ or a bound is not positive.

    >>> values, gains = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0, -1.0])
    >>> bounded_log_ratios(values, gains, low=0.4, high=0.4)
    tensor([ 0.4000,  1.0000, -0.4000])
    """
    same(log_ratios=log_ratios, advantages=advantages)
    for name, bound in (("low", low), ("high", high)):
        if not bound > 0:
            raise ValueError(f"`{name}` must be above 0, got {bound}")
    below_or_free = torch.where(advantages < 0, log_ratios.clamp(min=-low), log_ratios)
    return torch.where(advantages > 0, log_ratios.clamp(max=high), below_or_free)


def divergence_mask(
    logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    delta: float | tuple[float, float],
    divergence: Literal["tv", "kl"] = "tv",
    cap: float | None = None,
    candidate_logprobs_BTK: Tensor | None = None,
    behaviour_candidate_logprobs_BTK: Tensor | None = None,
) -> Tensor:
    """Stop tokens by how far their distribution has moved, and not by their ratio.

        loss = -sg(M min(r, cap)) A log π(o),   r = π(o) / μ(o)
                                                    (DPPO Eq. 12, 23 [P, C]; docs/algorithms.md 5.6)

    μ is the policy as it sampled, never recomputed: a recomputed anchor collapses [P]. M is 0 where
    :func:`outside_trust_region` holds, else 1. Masked tokens stay in the denominator of a
    reduction. Probabilities are compared in float32: bfloat16 is off by 0.0016 near 0.9 [V].

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats. Carries the gradient.
        behaviour_logprobs_BT: The same as recorded by the sampler, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        delta: Trust region, above 0; two numbers bound (falling, rising) probabilities. Probability
            for "tv" (0.15 to 0.2 [P]), nats for "kl" (0.05 [P]).
        divergence: "tv", total variation, or "kl", from μ to π.
        cap: Largest weight; None: none, as in the paper's stability study; 5 when scaling [P].
        candidate_logprobs_BTK: Log-probabilities of the ids that μ found most probable, with the
            sampled one among them, shape ``[B, T, K]``; -inf in slots without one. None: the binary
            divergence (token, all others).
        behaviour_candidate_logprobs_BTK: The same under μ.

    Returns:
        Losses, shape ``[B, T]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If shapes differ, an option is out of range, or one policy lacks candidates.

    >>> moved, mu = torch.tensor([[0.8, 0.8]]).log(), torch.tensor([[0.99, 0.99]]).log()
    >>> divergence_mask(moved, mu, torch.tensor([[-1.0, 1.0]]), delta=0.15)
    tensor([[-0.0000, 0.1803]])
    """
    outside = outside_trust_region(
        logprobs_BT,
        behaviour_logprobs_BT,
        advantages_BT,
        delta=delta,
        divergence=divergence,
        candidate_logprobs_BTK=candidate_logprobs_BTK,
        behaviour_candidate_logprobs_BTK=behaviour_candidate_logprobs_BTK,
    )
    if cap is not None and not cap >= 1:
        raise ValueError(f"`cap` must be at least 1, got {cap}")
    weights = safe_ratio(logprobs_BT.detach() - behaviour_logprobs_BT.detach())
    if cap is not None:
        weights = weights.clamp(max=cap)
    return -(weights * ~outside) * advantages_BT * logprobs_BT


def _check_clip(low: float | Tensor, high: float | Tensor) -> None:
    lows, highs = torch.as_tensor(low), torch.as_tensor(high)
    if not ((lows >= 0) & (lows < 1)).all():
        raise ValueError(f"`low` must be in [0, 1), got {low}")
    if not (highs >= 0).all():
        raise ValueError(f"`high` must be at least 0, got {high}")
