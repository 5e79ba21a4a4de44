"""From a log-ratio and an advantage to the loss of one action: how far may the policy move?

PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with the clip-higher of DAPO (arXiv:2503.14476) and the
dual clip (Ye et al. 2020, arXiv:1912.09729). An action is whatever the log-ratio was taken over: a token gives GRPO and
DAPO, a block MPO, a sequence GSPO. CISPO and ASPO weigh the log-probabilities of tokens. All functions return unreduced
losses, to be minimised.
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this size before they are exponentiated (core-algorithms 1.6, verl)."""


def safe_ratio(log_ratios: Tensor) -> Tensor:
    """Exponentiate log-ratios, clamped to ±20 so that neither ratio nor gradient overflows.

        r = exp(clamp(log r, -20, 20))                        [CODE, verl; core-algorithms 1.6]

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
    log_ratios_BU: Tensor, advantages_BU: Tensor, *, low: float, high: float, dual: float | None = None
) -> Tensor:
    """Clip the ratio of an action, so that an update earns nothing beyond the trust region.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A)        (PPO Eq. 7; core-algorithms 0; MPO Eq. 13, [I])
        loss = min(loss, -dual A)   where A < 0               (dual clip; related-algorithms 9.1, [CODE] verl)

    The gradient with respect to log r is ``-M r A``, with M = 0 if A > 0 and r > 1 + high, or if A < 0 and either r < 1
    - low or r > dual; else M = 1.

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats. Carries the gradient.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.
        low: How far the ratio may fall below 1, in (0, 1).
        high: How far the ratio may rise above 1, above 0.
        dual: Ratio beyond which actions with a negative advantage lose their gradient, above 1. None: no dual clip.

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
    losses = torch.maximum(-ratios * advantages_BU, -ratios.clamp(1 - low, 1 + high) * advantages_BU)
    if dual is None:
        return losses
    return torch.where((advantages_BU < 0) & (ratios > dual), -dual * advantages_BU, losses)


def clipped_weight(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, low: float, high: float
) -> Tensor:
    """Clip the importance weight and not the gradient, so that every token goes on learning.

        loss = -sg(clip(r, 1 - low, 1 + high)) A log π(o)  (CISPO, arXiv:2506.13585; related-algorithms 9.5 [CODE] verl)

    MiniMax-M1 and TRL bound the weight from above only: ``low=1``.

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats. Carries the gradient.
        old_logprobs_BT: The same at rollout weights, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        low: How far the weight may fall below 1, in (0, 1]; 1 is no bound.
        high: How far the weight may rise above 1, above 0.

    Returns:
        Losses, shape ``[B, T]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> clipped_weight(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[1.0]]), low=0.2, high=0.5)
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
    low: float,
    high: float,
    cap_positive: float,
    cap_negative: float,
) -> Tensor:
    """Weigh good tokens with the inverse ratio, so that the unlikely ones learn most, and bad ones with the ratio.

        loss = -sg(M w) A log π(o),   w = min(1/r, cap_positive) where A >= 0,   min(r, cap_negative) where A < 0
                                                              (ASPO, arXiv:2510.06062 Eq. 3 [P][C]; core-algorithms 4.2)

    M = 0 if A > 0 and r > 1 + high, or if A < 0 and r < 1 - low; else M = 1. The caps weigh, they stop no gradient.

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats. Carries the gradient.
        old_logprobs_BT: The same at rollout weights, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        low: How far the ratio of a bad token may fall below 1, in (0, 1).
        high: How far the ratio of a good token may rise above 1, above 0.
        cap_positive: Largest weight of a good token, at least 1 (3 in the released code [C]).
        cap_negative: Largest weight of a bad token, at least 1 (3 in the released code [C]).

    Returns:
        Losses, shape ``[B, T]``. Compare gradients with other methods, not values.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> options = {"low": 0.2, "high": 0.2, "cap_positive": 3.0, "cap_negative": 3.0}
    >>> old = torch.log(torch.tensor([[0.8, 0.8]]))
    >>> asymmetric_ratio(torch.log(torch.tensor([[0.4, 0.4]])), old, torch.tensor([[1.0, -1.0]]), **options)
    tensor([[1.8326, -0.0000]])
    """
    check(logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT)
    _check_clip(low, high)
    for name, cap in (("cap_positive", cap_positive), ("cap_negative", cap_negative)):
        if not cap >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {cap}")
    log_ratios = logprobs_BT.detach() - old_logprobs_BT.detach()
    ratios, inverses = safe_ratio(log_ratios), safe_ratio(-log_ratios)
    good = inverses.clamp(max=cap_positive) * ~((advantages_BT > 0) & (ratios > 1 + high))
    bad = ratios.clamp(max=cap_negative) * (ratios >= 1 - low)
    return -torch.where(advantages_BT < 0, bad, good) * advantages_BT * logprobs_BT


def _check_clip(low: float, high: float) -> None:
    if not 0 < low < 1:
        raise ValueError(f"`low` must be in (0, 1), got {low}")
    if not high > 0:
        raise ValueError(f"`high` must be above 0, got {high}")
