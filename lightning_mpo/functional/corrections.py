"""Importance weights for a sampler whose log-probs differ from the trainer's at the same weights.

An inference engine with other kernels, another precision or slightly older weights samples from μ,
while the trainer recomputes π_old. The surrogate's ratio is π / π_old; the weight π_old / μ makes
up for the rest. Truncated importance sampling (TIS) bounds it from above, masked importance
sampling drops what lies outside of bounds; TRL's default masks whole sequences beyond 3 [C]
(docs/algorithms.md 9).
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.surrogates import safe_ratio


@torch.no_grad()
def sampler_weights(
    old_logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    sequence: bool = False,
) -> Tensor:
    """Weigh tokens, or whole responses, by how much more probable the trainer holds them than the
    sampler did.

        w_t = π_old(o_t) / μ(o_t)   or, for all tokens of a response,   w = Π_t π_old(o_t) / μ(o_t)

    The product is the exact weight of a response; the token's own leaves the distribution of the
    tokens before it out.

    Args:
        old_logprobs_BT: Of the trainer at rollout weights, shape ``[B, T]``, nats.
        behaviour_logprobs_BT: As recorded by the sampler, shape ``[B, T]``, nats.
        mask_BT: Tokens that were sampled, shape ``[B, T]``.
        sequence: Whether to take the product over a response.

    Returns:
        Weights, shape ``[B, T]``, 1 where masked. Log-weights are clamped to ±20.

    Raises:
        ValueError: If shapes differ.

    >>> old, behaviour = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.5]])
    >>> sampler_weights(old, behaviour, torch.tensor([[True, True]]), sequence=True)
    tensor([[1.6487, 1.6487]])
    """
    check(
        old_logprobs_BT=old_logprobs_BT,
        behaviour_logprobs_BT=behaviour_logprobs_BT,
        mask_BT=mask_BT,
    )
    gaps_BT = torch.where(mask_BT, old_logprobs_BT - behaviour_logprobs_BT, 0)
    if sequence:
        gaps_BT = torch.where(mask_BT, gaps_BT.sum(1, keepdim=True), 0)
    return safe_ratio(gaps_BT)


def truncated(weights: Tensor, *, cap: float) -> Tensor:
    """Bound weights from above: `min(w, cap)`.

    Args:
        weights: Importance weights, any shape.
        cap: Largest weight, above 0.

    Returns:
        Weights, same shape.

    Raises:
        ValueError: If the cap is not positive.

    >>> truncated(torch.tensor([0.5, 3.0]), cap=2.0)
    tensor([0.5000, 2.0000])
    """
    if not cap > 0:
        raise ValueError(f"`cap` must be above 0, got {cap}")
    return weights.clamp(max=cap)


def masked(weights: Tensor, *, low: float, cap: float) -> Tensor:
    """Keep weights within bounds and set the others to 0: `w·1[low <= w <= cap]`.

    Args:
        weights: Importance weights, any shape.
        low: Smallest weight that is kept, at least 0.
        cap: Largest, above `low`.

    Returns:
        Weights, same shape.

    Raises:
        ValueError: If the bounds are out of order.

    >>> masked(torch.tensor([0.5, 1.5, 3.0]), low=1.0, cap=2.0)
    tensor([0.0000, 1.5000, 0.0000])
    """
    if not 0 <= low < cap:
        raise ValueError(f"`low` must be in [0, cap), got {low} and cap {cap}")
    return torch.where((weights >= low) & (weights <= cap), weights, 0)
