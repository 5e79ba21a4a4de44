"""Axis "support": over which part of the vocabulary the softmax of the policy is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import supports as F


class Support(ABC):
    """Chooses the tokens of one step. The rollout stores the choice; every later pass replays it."""

    @abstractmethod
    def select(self, logits_BV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return `(support_BK, support_mask_BK)`; `(None, None)` stands for the whole vocabulary.

        Args:
            logits_BV: logits after temperature.
        """

    def check(self, vocabulary: int) -> None:
        """Refuse a support that the vocabulary cannot hold."""


class FullVocabulary(Support):
    """The ordinary softmax."""

    def select(self, logits_BV: Tensor) -> tuple[None, None]:
        return None, None


class TopK(Support):
    """The k most probable tokens under the rollout-time policy (RLPT).

    The paper's abstract speaks of "base model" priors, a summary of "current policy" ranks; the rollout-time snapshot
    is the only reading under which the ratio's support condition holds exactly [I, core spec 2.1].

    Args:
        k: tokens kept per step; 8, 16 and 32 are reported for the paper [S], 16 is our default [I].
    """

    def __init__(self, k: int = 16) -> None:
        if k < 1:
            raise UserError(f"`TopK.k` must be at least 1, got {k}")
        self.k = k

    def select(self, logits_BV: Tensor) -> tuple[Tensor, None]:
        return F.top_k(logits_BV, self.k), None

    def check(self, vocabulary: int) -> None:
        if self.k > vocabulary:
            raise UserError(f"`TopK.k` must be at most the vocabulary size {vocabulary}, got {self.k}")
