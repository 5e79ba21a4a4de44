"""Axis "advantage": how much better an action was than what it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import advantages as F


class Advantage(ABC):
    """Turns rewards into advantages."""

    compares_group: ClassVar[bool] = False
    """True where a response is compared with the others of its prompt, so that one completion has no advantage."""

    @abstractmethod
    def estimate(self, rewards_B: Tensor, mask_BT: Tensor, group_size: int, valid_B: Tensor) -> Tensor:
        """Return `advantages_BT`; rows that are not valid get 0."""

    def check(self, group_size: int) -> None:
        """Refuse a group in which there is nothing to compare."""
        if self.compares_group and group_size < 2:
            raise UserError(
                f"`{type(self).__name__}` compares the completions of a prompt; `rollout.completions` must be at "
                f"least 2, got {group_size}"
            )


class GroupRelative(Advantage):
    """`(R - mean) / (std + 1e-4)` within the group (GRPO), or `R - mean` (Dr. GRPO).

    Args:
        scale: "std" divides by the group's standard deviation (Bessel-corrected, TRL's form [C]); "none" does not.
    """

    compares_group: ClassVar[bool] = True

    def __init__(self, scale: Literal["std", "none"] = "std") -> None:
        self.scale: Literal["std", "none"] = scale

    def estimate(self, rewards_B: Tensor, mask_BT: Tensor, group_size: int, valid_B: Tensor) -> Tensor:
        advantages_B = F.group_relative(rewards_B, group_size, scale=self.scale, valid_B=valid_B)
        return advantages_B[:, None].expand(mask_BT.shape) * mask_BT


class LeaveOneOut(Advantage):
    """`R_i - mean of the others` (RLOO)."""

    compares_group: ClassVar[bool] = True

    def estimate(self, rewards_B: Tensor, mask_BT: Tensor, group_size: int, valid_B: Tensor) -> Tensor:
        return F.leave_one_out(rewards_B, group_size, valid_B=valid_B)[:, None].expand(mask_BT.shape) * mask_BT
