"""From a log-ratio and an advantage to the loss of one action: how far may the policy move?

PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with the clip-higher of DAPO (arXiv:2503.14476) and the
dual clip (Ye et al. 2020, arXiv:1912.09729). An action is whatever the log-ratio was taken over: a token gives GRPO and
DAPO, a block MPO, a sequence GSPO. All functions return unreduced losses, to be minimised.
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


def _check_clip(low: float, high: float) -> None:
    if not 0 < low < 1:
        raise ValueError(f"`low` must be in (0, 1), got {low}")
    if not high > 0:
        raise ValueError(f"`high` must be above 0, got {high}")
