"""Rewards of thoughts in front of lines of code (RA3, arXiv:2509.25810)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def line_likelihoods(logprobs_BT: Tensor, mask_BT: Tensor, *, total: bool = False) -> Tensor:
    """Compute the log-likelihood of each line, per token or in total.

        L = (1/|a|) Σ_k log π(a_k | s, z, a_<k)       ([I]: the mean; total: the sum; docs/ra3.md)

    Args:
        logprobs_BT: Log-probabilities of the tokens of a line, shape ``[B, T]``, nats.
        mask_BT: Tokens of the line, bool, shape ``[B, T]``.
        total: Return sums instead of means.

    Returns:
        Log-likelihoods, shape ``[B]``, float64, nats or nats per token.

    Raises:
        ValueError: If the shapes differ.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> line_likelihoods(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), mask).tolist()
    [-1.5, -3.0]
    """
    check(logprobs_BT=logprobs_BT, mask_BT=mask_BT)
    sums_B = (logprobs_BT.double() * mask_BT).sum(1)
    return sums_B if total else sums_B / mask_BT.sum(1).clamp(min=1)


def thought_rewards(
    thought_B: Tensor,
    act_B: Tensor,
    thinks_B: Tensor,
    usable_B: Tensor,
    *,
    cost: float,
    penalty: float = 0.0,
    relative: bool = False,
) -> Tensor:
    """Compute the reward of thoughts and of acts without one.

        r = L(a | s, z) - c·1[z is a thought]        ([S]; docs/ra3.md)
        r = L(a | s) - c - penalty                   of a thought that cannot be used [I]
        r - L(a | s)                                 relative: the gain over an act [I]

    Args:
        thought_B: Log-likelihood of the line behind each thought, shape ``[B]``; read for usable
            thoughts alone.
        act_B: Log-likelihood of the line without a thought, shape ``[B]``.
        thinks_B: Which responses are thoughts, bool, shape ``[B]``.
        usable_B: Which of them can be used, bool, shape ``[B]``.
        cost: c, in the unit of the log-likelihoods.
        penalty: Subtracted for a thought that cannot be used.
        relative: Return gains over acts.

    Returns:
        Rewards, shape ``[B]``.

    Raises:
        ValueError: If the shapes differ.

    >>> thought, act = torch.tensor([-1.0, 0.0, 0.0]), torch.full((3,), -2.0)
    >>> thinks, usable = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    >>> thought_rewards(thought, act, thinks, usable, cost=0.5).tolist()
    [-1.5, -2.5, -2.0]
    """
    check(thought_B=thought_B, act_B=act_B, thinks_mask_B=thinks_B, usable_mask_B=usable_B)
    likelihood_B = torch.where(thinks_B & usable_B, thought_B, act_B)
    # bool times float is float32, which would round the cost
    thinks_B, unusable_B = (mask_B.to(act_B.dtype) for mask_B in (thinks_B, thinks_B & ~usable_B))
    rewards_B = likelihood_B - cost * thinks_B - penalty * unusable_B
    return rewards_B - act_B if relative else rewards_B
