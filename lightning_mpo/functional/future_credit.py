"""Which advantage does a future token of a block get? (docs/algorithms.md 3.7)

The gradient of a block's log-ratio is ``Σ_n β_n ∇ℓ_n``, and one advantage multiplies all of it. For the token itself any
baseline is free: ``E[b(s) ∇log π(o_t|s)] = 0``, as the token was drawn from π. For a future token it is free only if the
head q_n is calibrated, that is if ``q_n(o|s)`` is the probability of ``o_{t+n} = o``:

    E[b(s) ∇log q_n(o_{t+n}|s)] = -b(s) ∇CE(p_n, q_n),     p_n the true distribution n tokens ahead [V]

So the mean advantage at a state trains the head, and the trunk below it, to predict better where it is positive and
worse where it is negative. The functions here give future tokens advantages of their own.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.actions import block_log_ratios, window
from lightning_mpo.functional.shapes import check


def offset_log_ratios(
    log_ratios_BTN: Tensor,
    mask_BT: Tensor,
    weights_N: Tensor,
    *,
    stride: int = 1,
    tail: Literal["absorb", "renorm"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split each block into its offsets: the value of the block's log-ratio, the gradient of one offset's.

        log R_{t,n} = sg(log R_t) + ℓ_n(t) - sg(ℓ_n(t))          (docs/algorithms.md 3.7)

    For any loss f of a ratio and an advantage, ``Σ_n β_n f(R_{t,n}, A_{t,n})`` has the value and the gradient of
    ``f(R_t, A_t)`` if all ``A_{t,n} = A_t`` and the weights sum to 1. An offset past the end of its block has the block's
    value and no gradient.

    Args:
        log_ratios_BTN: log(q_n / q_n_old) of token t+n as predicted at t, nats, shape ``[B, T, N]``.
        mask_BT: Response tokens that count, shape ``[B, T]``.
        weights_N: β by offset, shape ``[N]``; they sum to 1.
        stride: As in ``actions.block_log_ratios``.
        tail: As in ``actions.block_log_ratios``.

    Returns:
        Log-ratios ``[B, U, N]``, weights ``[B, U, N]`` that sum to 1 in each block, where blocks start, and tokens per
        block (both ``[B, U]``, U = T).

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> log_ratios, mask = torch.tensor([[[0.1, 0.3], [0.2, 9.0]]]), torch.tensor([[True, True]])
    >>> offset_log_ratios(log_ratios, mask, torch.tensor([0.5, 0.5]))[0]
    tensor([[[0.2000, 0.2000],
             [0.1000, 0.1000]]])
    """
    check(log_ratios_BTN=log_ratios_BTN, weights_N=weights_N, mask_BT=mask_BT)
    length = len(weights_N)
    blocks_BU, starts_BU, tokens_BU = block_log_ratios(
        log_ratios_BTN.detach(), mask_BT, weights_N, stride=stride, tail=tail
    )
    alive = torch.stack([window(mask_BT, n) for n in range(length)], -1) & starts_BU[..., None]
    # the value of the block, the gradient of the offset
    offsets = torch.where(alive, log_ratios_BTN, 0)
    log_ratios_BUN = blocks_BU[..., None] + offsets - offsets.detach()
    # an offset past the end keeps its weight if it is absorbed, and loses it to the others if not
    weights_BUN = weights_N.to(log_ratios_BTN).expand_as(alive)
    if tail == "renorm" or (tail is None and stride > 1):
        left = (alive * weights_BUN).sum(-1, keepdim=True)
        weights_BUN = torch.where(left > 0, alive * weights_BUN * (weights_N.sum() / left), 0)
    return log_ratios_BUN, weights_BUN, starts_BU, tokens_BU


@torch.no_grad()
def prefix_advantages(
    tokens_BT: Tensor,
    mask_BT: Tensor,
    rewards_B: Tensor,
    group_size: int,
    *,
    valid_B: Tensor | None = None,
) -> Tensor:
    """Compare a reward with the mean of the completions that share the tokens before t.

        A_t = R - V(o_{<t}),     V(p) = mean reward of the group's completions that start with p     [I]

    The mean over completions is 0 at every state that they share. A state of one completion has advantage 0.

    Args:
        tokens_BT: Response ids, groups consecutive, shape ``[B, T]``.
        mask_BT: Tokens of the policy, shape ``[B, T]``.
        rewards_B: Rewards, shape ``[B]``.
        group_size: Completions per prompt, at least 2.
        valid_B: False for rows whose reward means nothing, shape ``[B]``; they are in no mean and get 0.

    Returns:
        Advantages, shape ``[B, T]``, 0 outside the mask.

    Raises:
        ValueError: If shapes differ, the rows are no whole groups, or a group has one row.

    >>> tokens, mask = torch.tensor([[5, 1], [5, 2]]), torch.ones(2, 2, dtype=torch.bool)
    >>> prefix_advantages(tokens, mask, torch.tensor([1.0, 0.0]), 2)
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    sizes = check(tokens_BT=tokens_BT, mask_BT=mask_BT, rewards_B=rewards_B, valid_B=valid_B)
    rows, group = sizes["B"], _check_groups(sizes["B"], group_size)
    valid_B = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B
    rewards_B = torch.where(valid_B, rewards_B, 0)
    # an ended response shares no state with one that goes on
    before_end = mask_BT.flip(1).cumsum(1).flip(1) > 0
    steps_BT = tokens_BT.long().masked_fill(~before_end, -1)
    advantages_BT = rewards_B.new_zeros(mask_BT.shape)
    same_PGG = valid_B.view(-1, group, 1) & valid_B.view(-1, 1, group)
    for t in range(sizes["T"]):
        count = same_PGG.sum(-1).clamp(min=1)
        means = (same_PGG * rewards_B.view(-1, 1, group).double()).sum(-1) / count
        advantages_BT[:, t] = (rewards_B - means.view(rows)).to(rewards_B)
        steps = steps_BT[:, t].view(-1, group)
        same_PGG = same_PGG & (steps[:, :, None] == steps[:, None, :])
    return torch.where(mask_BT & valid_B[:, None], advantages_BT, 0)


@torch.no_grad()
def centred_advantages(
    advantages_BT: Tensor, mask_BT: Tensor, group_size: int, *, valid_B: Tensor | None = None
) -> Tensor:
    """Subtract the group's mean at the same position.

        A'_t = A_t - mean of A_t over the completions of the group that reach position t     [I]

    Args:
        advantages_BT: Advantages, groups consecutive, shape ``[B, T]``.
        mask_BT: Tokens of the policy, shape ``[B, T]``.
        group_size: Completions per prompt, at least 2.
        valid_B: False for rows that are in no mean and get 0, shape ``[B]``.

    Returns:
        Advantages, shape ``[B, T]``, 0 outside the mask and at positions that one completion reaches.

    Raises:
        ValueError: If shapes differ, the rows are no whole groups, or a group has one row.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> centred_advantages(torch.tensor([[3.0, 5.0], [1.0, 9.0]]), mask, 2)
    tensor([[ 1.,  0.],
            [-1.,  0.]])
    """
    sizes = check(advantages_BT=advantages_BT, mask_BT=mask_BT, valid_B=valid_B)
    group = _check_groups(sizes["B"], group_size)
    if valid_B is not None:
        mask_BT = mask_BT & valid_B[:, None]
    values = torch.where(mask_BT, advantages_BT, 0).double().view(-1, group, sizes["T"])
    count = mask_BT.view(-1, group, sizes["T"]).sum(1, keepdim=True).clamp(min=1)
    centred_BT = (values - values.sum(1, keepdim=True) / count).view_as(advantages_BT)
    return torch.where(mask_BT, centred_BT, 0).to(advantages_BT.dtype)


@torch.no_grad()
def bound_negatives(
    advantages_BTM: Tensor, old_future_BTM: Tensor, old_logprobs_BTM: Tensor
) -> Tensor:
    """Weigh negative advantages of future tokens by how probable the head made the token.

        A'_n = A_n · min(1, q_n_old(o_{t+n}) / π_old(o_{t+n}))   where A_n < 0,   else A_n          [I]

    The tokens are drawn from π. A head that gives a token almost no probability would be pushed down as long as π draws
    it; with this weight the push ends with q.

    Args:
        advantages_BTM: Advantages of offsets 1 … M, shape ``[B, T, M]``.
        old_future_BTM: log q_n_old of token t+n as predicted at t, nats, shape ``[B, T, M]``.
        old_logprobs_BTM: log π_old of the same tokens at their positions, nats, shape ``[B, T, M]``.

    Returns:
        Advantages, shape ``[B, T, M]``.

    Raises:
        ValueError: If shapes differ.

    >>> half, all_ = torch.tensor([[[0.5]]]).log(), torch.tensor([[[1.0]]]).log()
    >>> bound_negatives(torch.tensor([[[-2.0]]]), half, all_), bound_negatives(torch.tensor([[[2.0]]]), half, all_)
    (tensor([[[-1.]]]), tensor([[[2.]]]))
    """
    check(
        advantages_BTM=advantages_BTM,
        old_future_BTM=old_future_BTM,
        old_logprobs_BTM=old_logprobs_BTM,
    )
    weights_BTM = (old_future_BTM - old_logprobs_BTM).clamp(max=0).exp()
    return torch.where(advantages_BTM < 0, advantages_BTM * weights_BTM, advantages_BTM)


def _check_groups(rows: int, group_size: int) -> int:
    if group_size < 2:
        raise ValueError(
            "`group_size` must be at least 2 (a completion is compared with others), got "
            f"{group_size}"
        )
    if rows % group_size:
        raise ValueError(f"{rows} rows are no whole groups of {group_size}")
    return group_size
