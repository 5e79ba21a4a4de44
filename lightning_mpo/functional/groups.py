"""Which groups of completions tell right from wrong (DAPO's dynamic sampling, arXiv:2503.14476)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


@torch.no_grad()
def mixed_groups(
    correct_mask_B: Tensor, group_size: int, *, valid_B: Tensor | None = None
) -> Tensor:
    """Mark the groups in which some completions are right and some are wrong.

        0 < |{i : o_i is right}| < G   ([C, verl's filter on accuracy]; docs/algorithms.md 4.7)

    The criterion is accuracy and not the reward: a penalty on lengths breaks ties between
    completions that are all right. Rows that are not valid are neither right nor wrong.

    Args:
        correct_mask_B: Which completions are right, groups consecutive, bool, shape ``[B]``.
        group_size: G, completions per prompt.
        valid_B: False for rows that were not judged, shape ``[B]``.

    Returns:
        Bool, shape ``[P]``, one for each group.

    Raises:
        ValueError: If the rows are no whole groups.

    >>> mixed_groups(torch.tensor([True, False, True, True, False, False]), 2)
    tensor([ True, False, False])
    """
    rows = check(correct_mask_B=correct_mask_B, valid_B=valid_B)["B"]
    if group_size < 1 or rows % group_size:
        raise ValueError(
            f"`correct_mask_B` must hold whole groups of `group_size` = {group_size}, got {rows} "
            "rows"
        )
    valid_B = torch.ones_like(correct_mask_B) if valid_B is None else valid_B
    right, wrong = correct_mask_B & valid_B, ~correct_mask_B & valid_B
    return right.view(-1, group_size).any(1) & wrong.view(-1, group_size).any(1)
