"""A clip whose range grows with the position of the action in its response (CTPO)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same
from lightning_mpo.functional.surrogates import safe_ratio


def position_clip(
    log_ratios_BU: Tensor,
    advantages_BU: Tensor,
    positions_BU: Tensor,
    *,
    low: float,
    high: float,
    power: float,
    dual: float | None = None,
) -> Tensor:
    """Clip the logarithm of a ratio to a range that is scaled with its position.

        loss = -min(R A, exp(clip(log R, -low t^p, high t^p)) A)
        loss = min(loss, -exp(dual t^p) A)   where A < 0
                                        (CTPO, arXiv:2605.07331 [P, abstract; C, the authors' code])

    The log-ratio of a prefix is a sum of t terms, so its spread grows like √t: p = 1/2. The spread of
    a mean of t terms falls like 1/√t: p = -1/2 [C]. The gradient with respect to log R is
    ``-M R A``, with M = 0 where :func:`outside_position_clip` is true, else 1.

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats. Carries the gradient.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.
        positions_BU: t, number of the action within its response, from 1, shape ``[B, U]``.
        low: Largest fall of the log-ratio of the first action, nats, above 0.
        high: Largest rise of this log-ratio, nats, above 0.
        power: p, the exponent of the position.
        dual: Largest log-ratio of the first action with a negative advantage, nats, above 0. None:
            no dual clip.

    Returns:
        Losses, shape ``[B, U]``.

    Raises:
        ValueError: If shapes differ or a bound is not positive.

    >>> log_ratios, gains = torch.tensor([[0.3, 0.3]]), torch.ones(1, 2)
    >>> positions = torch.tensor([[1.0, 4.0]])
    >>> position_clip(log_ratios, gains, positions, low=0.1, high=0.1, power=0.5)
    tensor([[-1.1052, -1.2214]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU, positions_BU=positions_BU)
    _check_bounds(low, high, dual)
    scale_BU = _scale(positions_BU, power, log_ratios_BU)
    clipped_BU = torch.clamp(log_ratios_BU, -low * scale_BU, high * scale_BU)
    losses_BU = torch.maximum(
        -safe_ratio(log_ratios_BU) * advantages_BU, -safe_ratio(clipped_BU) * advantages_BU
    )
    if dual is None:
        return losses_BU
    beyond_BU = (advantages_BU < 0) & (log_ratios_BU > dual * scale_BU)
    return torch.where(beyond_BU, -safe_ratio(dual * scale_BU) * advantages_BU, losses_BU)


def outside_position_clip(
    log_ratios: Tensor,
    advantages: Tensor,
    positions: Tensor,
    *,
    low: float,
    high: float,
    power: float,
    dual: float | None = None,
) -> Tensor:
    """Return whether :func:`position_clip` stops the gradient of each action.

        (A > 0 and log R > high t^p)   or   (A < 0 and (log R < -low t^p or log R > dual t^p))

    Args:
        log_ratios: Log-ratios of actions, any shape, nats.
        advantages: Advantages of the actions, same shape.
        positions: Number of each action within its response, from 1, same shape.
        low: As in :func:`position_clip`.
        high: As in :func:`position_clip`.
        power: As in :func:`position_clip`.
        dual: As in :func:`position_clip`.

    Returns:
        Bool, same shape.

    Raises:
        ValueError: If shapes differ or a bound is not positive.

    >>> log_ratios, positions = torch.tensor([0.15, 0.15]), torch.tensor([1.0, 4.0])
    >>> outside_position_clip(log_ratios, torch.ones(2), positions, low=0.1, high=0.1, power=0.5)
    tensor([ True, False])
    """
    same(log_ratios=log_ratios, advantages=advantages, positions=positions)
    _check_bounds(low, high, dual)
    scale = _scale(positions, power, log_ratios)
    above = (advantages > 0) & (log_ratios > high * scale)
    below = (advantages < 0) & (log_ratios < -low * scale)
    if dual is not None:
        below = below | ((advantages < 0) & (log_ratios > dual * scale))
    return above | below


def _scale(positions: Tensor, power: float, like: Tensor) -> Tensor:
    return positions.to(like).clamp(min=1).pow(power)


def _check_bounds(low: float, high: float, dual: float | None) -> None:
    for name, bound in (("low", low), ("high", high), ("dual", dual)):
        if bound is not None and not bound > 0:
            raise ValueError(f"`{name}` must be above 0, got {bound}")
