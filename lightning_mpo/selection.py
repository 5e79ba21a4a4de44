"""Axis "selection": which tokens carry gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Selection(ABC):
    """Chooses tokens once per rollout."""

    @abstractmethod
    def choose(self, mask_BT: Tensor, generator: torch.Generator) -> Tensor:
        """Return `token_weights_BT`, 0 where a token is not scored."""


class AllTokens(Selection):
    """Every response token, at weight 1."""

    def choose(self, mask_BT: Tensor, generator: torch.Generator) -> Tensor:
        return mask_BT.float()
