"""Credit for the tokens at which completions of a prompt part (T-SPMO; docs/algorithms.md 4.6)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, check_groups


@torch.no_grad()
def prefix_tree(
    tokens_BT: Tensor,
    mask_BT: Tensor,
    rewards_B: Tensor,
    group_size: int,
    *,
    valid_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give credit to the tokens at which completions of a group part, and to no others.

        V(p) = mean reward of the completions that start with prefix p,   A(v | p) = V(pv) - V(p)
        weight = 1 / (number of completions through pv) where p branches, else 0
                                                         (T-SPMO [REC, I]; docs/algorithms.md 4.6)

    Each distinct pair (p, v) thus counts once, and the weights sum to |U|. A completion that ends
    where another goes on is a branch. Tokens outside the mask but before a row's end are part of
    the prefix; they get advantage and weight 0. Rows that are not valid stand in a tree of their
    own: they are in no mean and get 0.

    Args:
        tokens_BT: Response ids, groups consecutive, shape ``[B, T]``.
        mask_BT: Tokens of the policy, shape ``[B, T]``.
        rewards_B: Rewards, shape ``[B]``.
        group_size: Completions per prompt, at least 2.
        valid_B: False for rows whose reward means nothing, shape ``[B]``.

    Returns:
        Advantages and weights, each of shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, the rows are no whole groups, or a group has one row.

    >>> tokens, mask = torch.tensor([[5, 1], [5, 2]]), torch.ones(2, 2, dtype=torch.bool)
    >>> prefix_tree(tokens, mask, torch.tensor([1.0, 0.0]), 2)
    (tensor([[ 0.0000,  0.5000],
            [ 0.0000, -0.5000]]), tensor([[0., 1.],
            [0., 1.]]))
    """
    sizes = check(tokens_BT=tokens_BT, mask_BT=mask_BT, rewards_B=rewards_B, valid_B=valid_B)
    check_groups(sizes["B"], group_size)
    if valid_B is not None:
        mask_BT, rewards_B = mask_BT & valid_B[:, None], torch.where(valid_B, rewards_B, 0)
    # the path of each row: its tokens, then an end
    before_end = mask_BT.flip(1).cumsum(1).flip(1) > 0
    steps_BT = tokens_BT.long().masked_fill(~before_end, -1)
    advantages, weights = rewards_B.new_zeros(mask_BT.shape), rewards_B.new_zeros(mask_BT.shape)
    rows_B = torch.arange(sizes["B"], device=rewards_B.device)
    nodes = _roots(rows_B, group_size, valid_B)
    # down the trees: nodes -> children
    for t in range(sizes["T"]):
        pairs, children = torch.stack([nodes, steps_BT[:, t]], 1).unique(dim=0, return_inverse=True)
        branches = torch.bincount(pairs[:, 0], minlength=sizes["B"])[nodes] > 1
        counted = mask_BT[:, t] & branches
        gains = (_mean_by(rewards_B, children) - _mean_by(rewards_B, nodes)).to(advantages)
        advantages[:, t] = torch.where(counted, gains, 0)
        weights[:, t] = torch.where(
            counted, 1 / torch.bincount(children)[children].to(rewards_B), 0
        )
        nodes = children
    return advantages, weights


def _roots(rows_B: Tensor, group_size: int, valid_B: Tensor | None) -> Tensor:
    """Return the root of each row: one for a group, and one for each row that is not valid."""
    if valid_B is None:
        return rows_B // group_size
    roots = torch.where(valid_B, rows_B // group_size, len(rows_B) // group_size + rows_B)
    return roots.unique(return_inverse=True)[1]


def _mean_by(values_B: Tensor, groups_B: Tensor) -> Tensor:
    """Return the mean of each row's group, in float64: the mean of equal values is exact."""
    sums = values_B.new_zeros(len(values_B), dtype=torch.float64).index_add(
        0, groups_B, values_B.double()
    )
    return (sums / torch.bincount(groups_B, minlength=len(values_B)).clamp(min=1))[groups_B]
