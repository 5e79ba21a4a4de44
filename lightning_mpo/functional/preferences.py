"""Pairs of a better and a worse response to one prompt (DPO, arXiv:2305.18290).

Equations and sources: docs/algorithms.md 4.10 and 5.9.
"""

from typing import Literal

import torch
import torch.nn.functional as nn_functional
from torch import Tensor

from lightning_mpo.functional.shapes import check, check_groups


@torch.no_grad()
def preferences(
    rewards_B: Tensor,
    group_size: int,
    *,
    pairs: Literal["extremes", "all"] = "extremes",
    valid_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Count the pairs of its group that a response wins, minus those that it loses.

        A_i = #{j : (i, j) is a pair} - #{j : (j, i) is a pair}         docs/algorithms.md 4.10 [I]

    (i, j) is a pair if the reward of i is above that of j. "extremes" makes one pair of a group,
    the first highest reward against the first lowest. "all" makes all pairs. Equal rewards make
    none.

    Args:
        rewards_B: Rewards, groups consecutive, shape ``[B]``.
        group_size: G, completions per prompt.
        pairs: Which pairs of a group count.
        valid_B: False for rows whose reward means nothing, shape ``[B]``; they are in no pair.

    Returns:
        Advantages in pairs, dtype of the rewards, shape ``[B]``; and the rows that stand in a pair,
        bool, shape ``[B]``.

    Raises:
        ValueError: If shapes differ, the rows are no whole groups, or `pairs` is unknown.

    >>> preferences(torch.tensor([0.2, 0.9, 0.5, 1.0, 1.0, 1.0]), 3)
    (tensor([-1.,  1.,  0.,  0.,  0.,  0.]), tensor([ True,  True, False, False, False, False]))
    >>> preferences(torch.tensor([0.2, 0.9, 0.5]), 3, pairs="all")[0]
    tensor([-2.,  2.,  0.])
    """
    check_groups(check(rewards_B=rewards_B, valid_B=valid_B)["B"], group_size)
    if pairs not in ("extremes", "all"):
        raise ValueError(f"`pairs` must be 'extremes' or 'all', got {pairs!r}")
    rewards_PG = rewards_B.view(-1, group_size)
    valid_PG = torch.ones_like(rewards_PG, dtype=torch.bool)
    if valid_B is not None:
        valid_PG = valid_B.view(-1, group_size)
    # wins_PGG[p, i, j]: i and j are a pair, and i is better
    both_PGG = valid_PG[:, :, None] & valid_PG[:, None, :]
    wins_PGG = (rewards_PG[:, :, None] > rewards_PG[:, None, :]) & both_PGG
    if pairs == "extremes":
        best_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).argmax(1)
        worst_P = rewards_PG.masked_fill(~valid_PG, torch.inf).argmin(1)
        one_PGG = torch.zeros_like(wins_PGG)
        one_PGG[torch.arange(len(best_P), device=best_P.device), best_P, worst_P] = True
        wins_PGG = wins_PGG & one_PGG
    advantages_PG = wins_PGG.sum(2) - wins_PGG.sum(1)
    paired_PG = (wins_PGG | wins_PGG.transpose(1, 2)).any(2)
    return advantages_PG.flatten().to(rewards_B.dtype), paired_PG.flatten()


def pair_margins(
    log_ratios_B: Tensor,
    advantages_B: Tensor,
    group_B: Tensor,
    *,
    beta: float,
    mask_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return by how much each better response has gained on each worse one of its prompt.

        margin_ij = β (d_i - d_j),   d = log π(y) - log π_ref(y)          docs/algorithms.md 5.9

    Args:
        log_ratios_B: d, of whole responses against the reference, nats, shape ``[B]``.
        advantages_B: Advantages; their order within a group says which response is better. Shape
            ``[B]``.
        group_B: Number of each row's prompt, shape ``[B]``.
        beta: β, above 0.
        mask_B: False for rows that are in no pair, shape ``[B]``; None: all rows may be.

    Returns:
        Margins, shape ``[B, B]``; and bool of the same shape, True where (i, j) is a pair and i the
        better response.

    Raises:
        ValueError: If shapes differ or `beta` is not above 0.

    >>> d, gains, group = torch.tensor([0.5, -0.5]), torch.tensor([1.0, -1.0]), torch.tensor([0, 0])
    >>> margins, pairs = pair_margins(d, gains, group, beta=2.0)
    >>> margins[pairs]
    tensor([2.])
    """
    check(log_ratios_B=log_ratios_B, advantages_B=advantages_B, group_B=group_B, mask_B=mask_B)
    if not beta > 0:
        raise ValueError(f"`beta` must be above 0, got {beta}")
    pairs_BB = (group_B[:, None] == group_B) & (advantages_B[:, None] > advantages_B)
    if mask_B is not None:
        pairs_BB = pairs_BB & mask_B[:, None] & mask_B
    return beta * (log_ratios_B[:, None] - log_ratios_B), pairs_BB


def pairwise_logistic(
    log_ratios_B: Tensor,
    advantages_B: Tensor,
    group_B: Tensor,
    *,
    beta: float,
    mask_B: Tensor | None = None,
) -> Tensor:
    """Return the loss of DPO, over the pairs of a group, for each of its rows.

        loss_i = mean over the pairs (w, l) of the group of i: -log σ(β (d_w - d_l))
                                            (arXiv:2305.18290 Eq. 7 [REC; C, TRL]; docs/algorithms.md 5.9)

    All rows of a group in `mask_B` have the same loss. Their mean is therefore the mean over groups
    of the mean over pairs. With one pair a group it is the mean over pairs.

    Args:
        log_ratios_B: d, log-probability of each response minus that under the reference, nats, shape
            ``[B]``. Carries the gradient.
        advantages_B: Advantages, whose order within a group makes the pairs, shape ``[B]``.
        group_B: Number of each row's prompt, shape ``[B]``. All rows of a group must be here.
        beta: β, per nat, above 0: a small β lets the policy go far from the reference.
        mask_B: False for rows that are in no pair; None: all rows may be.

    Returns:
        Losses, shape ``[B]``; 0 for rows outside the mask, and for groups without a pair.

    Raises:
        ValueError: If shapes differ or `beta` is not above 0.

    >>> d, gains, group = torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([0, 0])
    >>> pairwise_logistic(d, gains, group, beta=0.1)
    tensor([0.6931, 0.6931])
    """
    margins_BB, pairs_BB = pair_margins(
        log_ratios_B, advantages_B, group_B, beta=beta, mask_B=mask_B
    )
    losses_BB = torch.where(pairs_BB, -nn_functional.logsigmoid(margins_BB), 0.0)
    # sums of a group: over its rows as the better response
    same_BB = (group_B[:, None] == group_B).to(losses_BB)
    pairs_B = same_BB @ pairs_BB.sum(1).to(losses_BB)
    losses_B = same_BB @ losses_BB.sum(1) / pairs_B.clamp(min=1)
    return losses_B if mask_B is None else torch.where(mask_B, losses_B, 0.0)
