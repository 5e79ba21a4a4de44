"""From rewards to advantages: how good was an action, compared with what?

Within a group of completions of one prompt: GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783),
RLOO (arXiv:2402.14740), and the prefix tree of T-SPMO (arXiv:2504.20834). With a critic:
generalised advantage estimation (arXiv:1506.02438). Rows of a group are consecutive. Advantages are
data: nothing here carries a gradient (docs/algorithms.md 4).
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, check_groups

STD_EPSILON = 1e-4
"""Added to the standard deviation of a group (TRL; verl takes 1e-6)."""
WHITEN_EPSILON = 1e-8
"""Added to the variance of whitened advantages (TRL, verl)."""


@torch.no_grad()
def group_relative(
    rewards_B: Tensor,
    group_size: int,
    *,
    scale: Literal["std", "none"] = "std",
    valid_B: Tensor | None = None,
) -> Tensor:
    """Compare each reward with the mean of its group.

        A_i = (R_i - mean) / (std + 1e-4)   ("std": GRPO)   or   R_i - mean   ("none": Dr. GRPO)
                                                   Bessel-corrected [C, TRL]; docs/algorithms.md 4.1

    Groups of equal rewards give exactly 0. Rows that are not valid are in no mean and get 0, as do
    all rows of a group with fewer than two valid ones.

    Args:
        rewards_B: Rewards, groups consecutive, shape ``[B]``.
        group_size: Completions per prompt, at least 2.
        scale: Whether to divide by the group's standard deviation.
        valid_B: False for rows whose reward means nothing, shape ``[B]``.

    Returns:
        Advantages, shape ``[B]``.

    Raises:
        ValueError: If the rewards are no whole groups, or a group has one row.

    >>> group_relative(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2, scale="none")
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """
    if scale not in ("std", "none"):
        raise ValueError(f"`scale` must be 'std' or 'none', got {scale!r}")
    rewards, counted, count, mean = _groups(rewards_B, group_size, valid_B)
    centred = torch.where(counted, rewards - mean, 0)
    if scale == "std":
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation + STD_EPSILON)
    return centred.flatten()


@torch.no_grad()
def leave_one_out(rewards_B: Tensor, group_size: int, *, valid_B: Tensor | None = None) -> Tensor:
    """Compare each reward with the mean of the others in its group.

        A_i = R_i - mean_{j≠i} R_j = n / (n - 1) · (R_i - mean)   (RLOO; docs/algorithms.md 4.2)

    Groups of equal rewards give exactly 0; rows that are not valid are treated as in
    :func:`group_relative`.

    Args:
        rewards_B: Rewards, groups consecutive, shape ``[B]``.
        group_size: Completions per prompt, at least 2.
        valid_B: False for rows whose reward means nothing, shape ``[B]``.

    Returns:
        Advantages, shape ``[B]``.

    Raises:
        ValueError: If the rewards are no whole groups, or a group has one row.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 0.5]), 3)
    tensor([ 0.7500, -0.7500,  0.0000])
    """
    rewards, counted, count, mean = _groups(rewards_B, group_size, valid_B)
    return torch.where(counted, (rewards - mean) * count / (count - 1).clamp(min=1), 0).flatten()


@torch.no_grad()
def generalized_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    length: int = 1,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages from a critic, as an exponential mean of returns over several actions.

        Δ_t = r_t + γ r_{t+1} + … + γ^(N-1) r_{t+N-1} + γ^N V_{t+N} - V_t
        A_t = Δ_t + γ^N λ A_{t+N},   return_t = A_t + V_t

    N = 1 is GAE Eq. 16. With N > 1 an action is a block of N tokens, and λ counts blocks [I]
    (docs/algorithms.md 4.4). With λ = 1 each N gives the same advantages.

    The value after the last token is 0. ``t+1`` is the next token of the mask: tokens of others,
    such as tool output, are no step of the policy, and values are carried across them as in verl
    [C].

    Args:
        rewards_BT: Reward of each token, shape ``[B, T]``.
        values_BT: Value of the state before each token, shape ``[B, T]``.
        mask_BT: Tokens of the policy, shape ``[B, T]``.
        gamma: Discount per token, in [0, 1].
        lam: λ of the estimator, in [0, 1].
        length: N, number of tokens of an action, at least 1.

    Returns:
        Advantages and returns, each of shape ``[B, T]``, 0 outside the mask.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.8]])
    >>> generalized_advantages(rewards, values, torch.tensor([[True, True]]), gamma=1.0, lam=1.0)
    (tensor([[0.5000, 0.2000]]), tensor([[1., 1.]]))
    """
    check(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    for name, option in (("gamma", gamma), ("lam", lam)):
        if not 0 <= option <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {option}")
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}")
    # the tokens of the mask, moved to the front, and zeros behind them
    order_BT = (~mask_BT).long().argsort(dim=1, stable=True)
    rewards_BX, values_BX = (
        torch.nn.functional.pad(torch.where(mask_BT, given, 0).gather(1, order_BT), (0, length))
        for given in (rewards_BT, values_BT)
    )
    # advantages, back at their places
    dense_BT = _backwards(rewards_BX, values_BX, gamma, lam, length)
    advantages_BT = torch.zeros_like(values_BT).scatter(1, order_BT, dense_BT)
    advantages_BT = torch.where(mask_BT, advantages_BT, 0)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0)


def _backwards(
    rewards_BX: Tensor, values_BX: Tensor, gamma: float, lam: float, length: int
) -> Tensor:
    """Return the advantages of rows without gaps, `[B, T]`; `X` is T + `length`, zeros at the end."""
    T, N = values_BX.shape[1] - length, length
    advantages_BX = torch.zeros_like(values_BX)
    for t in reversed(range(T)):
        reward_B = rewards_BX[:, t]
        for n in range(1, min(N, T - t)):
            reward_B = reward_B + gamma**n * rewards_BX[:, t + n]
        delta_B = reward_B + gamma**N * values_BX[:, t + N] - values_BX[:, t]
        advantages_BX[:, t] = delta_B + gamma**N * lam * advantages_BX[:, t + N]
    return advantages_BX[:, :T]


@torch.no_grad()
def at_last_token(rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Put the reward of a response at its last token.

    Args:
        rewards_B: One reward per response, shape ``[B]``.
        mask_BT: Response tokens, shape ``[B, T]``; a row without any gets no reward.

    Returns:
        Rewards per token, shape ``[B, T]``.

    >>> at_last_token(torch.tensor([2.0, 1.0]), torch.tensor([[True, True], [True, False]]))
    tensor([[0., 2.],
            [1., 0.]])
    """
    check(rewards_B=rewards_B, mask_BT=mask_BT)
    T = mask_BT.shape[1]
    here = torch.arange(1, T + 1, device=mask_BT.device) * mask_BT
    last = mask_BT & (here == here.amax(1, keepdim=True))
    return torch.where(last, rewards_B[:, None], 0)


@torch.no_grad()
def at_tokens(by_token_BC: Tensor, rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Put rewards of tokens at their tokens, and the rest of a response's reward at the last token.

        r_t = p_t for t < last,   r_last = R - Σ_{t<last} p_t,   so that Σ_t r_t = R
                                                                      ([I]; docs/algorithms.md 4)

    Args:
        by_token_BC: p, rewards of tokens, shape ``[B, C]``; column t is the t-th token of the mask.
            Missing columns are 0.
        rewards_B: R, the total reward of each response, shape ``[B]``.
        mask_BT: Response tokens, shape ``[B, T]``; a row without any gets no reward.

    Returns:
        Rewards per token, shape ``[B, T]``, with the dtype of ``by_token_BC``, 0 outside the mask.

    Raises:
        ValueError: If the shapes differ.

    >>> mask = torch.tensor([[True, False, True], [True, False, False]])
    >>> at_tokens(torch.tensor([[0.5, 0.25], [0.25, 0.0]]), torch.tensor([1.75, 0.25]), mask)
    tensor([[0.5000, 0.0000, 1.2500],
            [0.2500, 0.0000, 0.0000]])
    """
    check(by_token_BC=by_token_BC, rewards_B=rewards_B, mask_BT=mask_BT)
    # the reward of each token but the last
    columns = torch.nn.functional.pad(by_token_BC, (0, mask_BT.shape[1]))
    index_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    last_BT = at_last_token(torch.ones_like(rewards_B), mask_BT).bool()
    placed_BT = torch.where(mask_BT & ~last_BT, columns.gather(1, index_BT), 0)
    rest_B = rewards_B.to(placed_BT) - placed_BT.sum(1)
    return placed_BT + at_last_token(rest_B, mask_BT)


@torch.no_grad()
def moments(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Count masked values and sum them and their squares: what adds up over ranks, so that
    whitening is global.

    Args:
        values_BT: Values, shape ``[B, T]``; read where the mask holds.
        mask_BT: Which count, shape ``[B, T]``.

    Returns:
        ``[n, Σ x, Σ x²]`` in float64.

    >>> moments(torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[True, True, False]]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    check(values_BT=values_BT, mask_BT=mask_BT)
    values = values_BT[mask_BT].double()
    return torch.stack([mask_BT.sum().double(), values.sum(), values.square().sum()])


@torch.no_grad()
def whiten(values_BT: Tensor, mask_BT: Tensor, sums: Tensor) -> Tensor:
    """Give masked values mean 0 and standard deviation 1.

        (x - mean) / sqrt(var + 1e-8),   var = (Σ x² - n mean²) / (n - 1)
                                                         ([C, TRL and verl]; docs/algorithms.md 4.5)

    Args:
        values_BT: Values, shape ``[B, T]``.
        mask_BT: Which to whiten, shape ``[B, T]``.
        sums: :func:`moments` of all values that are whitened together, summed over ranks.

    Returns:
        Whitened values, shape ``[B, T]``, 0 outside the mask; fewer than two values give 0.

    >>> values, mask = torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]])
    >>> whiten(values, mask, moments(values, mask))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    check(values_BT=values_BT, mask_BT=mask_BT)
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    white = (values_BT.double() - mean) / (variance + WHITEN_EPSILON).sqrt()
    return torch.where(mask_BT & (count > 1), white, 0).to(values_BT.dtype)


def _groups(
    rewards_B: Tensor, group_size: int, valid_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rewards [P, G], the rows that get an advantage, and number and mean [P, 1] of the
    valid rows.
    """
    check_groups(check(rewards_B=rewards_B, valid_B=valid_B)["B"], group_size)
    valid = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B
    valid = valid.view(-1, group_size)
    rewards = torch.where(valid, rewards_B.view(-1, group_size), 0)
    count = valid.sum(1, keepdim=True)
    mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    return rewards, valid & (count > 1) & (highest > lowest), count, mean
