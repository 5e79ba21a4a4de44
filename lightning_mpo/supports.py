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


class Nucleus(Support):
    """The smallest set of most probable tokens with mass p, at most `max_k` of them: a support of varying size.

    Reported second-hand as a variant of RLPT [S, core spec 2.1 row 8]. The bound is ours: a flat distribution would
    otherwise store thousands of ids per step [I].

    Args:
        p: probability mass to keep, in (0, 1], after temperature.
        max_k: slots that are stored per step; those beyond the nucleus are masked, never valid ids.
    """

    def __init__(self, p: float = 0.95, max_k: int = 32) -> None:
        if not 0 < p <= 1:
            raise UserError(f"`Nucleus.p` must be a probability above 0, got {p}")
        self.p, self.max_k = p, max_k
        _check_slots(self)

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        return F.nucleus(logits_BV, self.p, self.max_k)

    def check(self, vocabulary: int) -> None:
        _check_slots(self, vocabulary)


class MinP(Support):
    """The tokens that are at least `ratio` times as probable as the most probable one, at most `max_k` of them.

    The rule by which vocabularies are pruned in arXiv:2512.23087 [S, core spec 2.5]; its threshold is not known [N].

    Args:
        ratio: in (0, 1], after temperature.
        max_k: slots that are stored per step.
    """

    def __init__(self, ratio: float = 0.05, max_k: int = 32) -> None:
        if not 0 < ratio <= 1:
            raise UserError(f"`MinP.ratio` must be in (0, 1], got {ratio}")
        self.ratio, self.max_k = ratio, max_k
        _check_slots(self)

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        return F.min_p(logits_BV, self.ratio, self.max_k)

    def check(self, vocabulary: int) -> None:
        _check_slots(self, vocabulary)


def _check_slots(support: Nucleus | MinP, vocabulary: int | None = None) -> None:
    name = f"`{type(support).__name__}.max_k`"
    if support.max_k < 1:
        raise UserError(f"{name} must be at least 1, got {support.max_k}")
    if vocabulary is not None and support.max_k > vocabulary:
        raise UserError(f"{name} must be at most the vocabulary size {vocabulary}, got {support.max_k}")


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
