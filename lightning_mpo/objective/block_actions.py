"""Blocks of N consecutive tokens as actions: MPO (docs/algorithms.md 3.2 to 3.4 and 3.7)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional import actions as F
from lightning_mpo.functional.future_credit import offset_log_ratios
from lightning_mpo.objective.action_spaces import Actions, ActionSpace, OffsetActions
from lightning_mpo.objective.block_weights import BlockWeights, FutureShare
from lightning_mpo.objective.future_credit import FutureCredit
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Experience

LONGEST_BLOCK = 4096
"""Most tokens of a block: each costs a pass over the log-ratios, and the paper uses 3 [S]."""


@dataclass(frozen=True)
class BlockActions(ActionSpace):
    """N consecutive tokens are one action (MPO): `R_t = exp(Σ_n beta_n · ell_n(t))`, `ell_0` the
    token's own log-ratio.

    Equations and evidence: docs/algorithms.md 3.2 to 3.4. With weights that sum to 1, R is a
    weighted geometric mean (MPO Eq. 12 [I]) and biased as an importance ratio; with `ratio="joint"`
    and weights of 1 it is the exact product (MPO Eq. 11 [S]).

    Args:
        weights: the betas; None: `FutureShare(0.2)` for the weighted ratio, all 1 for the joint
            one.
        length: N, tokens per block, the current one included [I]; 1 is the token-level method.
        stride: 1 slides the window over every token (default [I]); N cuts disjoint blocks.
        tail: what stands for offsets past the end: "absorb" counts them as ratio 1, "renorm"
            rescales the weights of the offsets that are left. None takes absorb at stride 1 and
            renorm at stride N.
        source: where the log-ratios of later offsets come from. "mtp": multi-token heads, log
            q_n(o_{t+n} | h_t), the paper's [S]. "backbone": the policy's own log-probs of those
            tokens, an ablation and not MPO.
        ratio: "weighted" wants weights that sum to 1; "joint" takes them as they are.
        credit: the advantage of the later tokens, which heads predict; None: that of the first
            token (the paper's letter [S]). It needs `source: mtp` and `ratio: weighted`, and changes
            nothing in blocks of one token.
    """

    weights: BlockWeights | None = None
    length: int = 3
    stride: int = 1
    tail: Literal["absorb", "renorm"] | None = None
    source: Literal["backbone", "mtp"] = "backbone"
    ratio: Literal["weighted", "joint"] = "weighted"
    credit: FutureCredit | None = None

    def __post_init__(self) -> None:
        at_least("BlockActions", 1, most=LONGEST_BLOCK, length=self.length)
        if self.stride not in (1, self.length):
            raise UserError(
                f"`BlockActions.stride` must be 1 or the block length {self.length}, got "
                f"{self.stride}"
            )
        total = sum(self.weights_N)
        if self.ratio == "weighted" and abs(total - 1) > 1e-6:
            raise UserError(
                f"the weights of `BlockActions` must sum to 1, got {total:.4g}; set `ratio: joint` "
                "for a product of ratios"
            )
        if self.credit is not None and (self.source != "mtp" or self.ratio != "weighted"):
            raise UserError(
                f"`BlockActions.credit: {type(self.credit).__name__}` is the advantage of tokens "
                "that heads predict; set `source: mtp` and `ratio: weighted`, or `credit: null`"
            )

    @cached_property
    def weights_N(self) -> list[float]:
        """The betas, one per offset."""
        if self.weights is not None:
            return self.weights.weights(self.length)
        return [1.0] * self.length if self.ratio == "joint" else FutureShare().weights(self.length)

    @property
    def future(self) -> int:
        """M: the offsets that heads must score."""
        return self.length - 1 if self.source == "mtp" else 0

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return F.block_log_ratios(
            log_ratios, mask_BT, self._betas(log_ratios), stride=self.stride, tail=self.tail
        )

    def check_group(self, group_size: int) -> None:
        if self.credit is not None:
            self.credit.check(group_size)

    def future_advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor | None:
        if self.credit is None or not self.future:
            return None
        return self.credit.advantages(outcome, advantages_BT)

    def offsets(
        self, log_ratios: Tensor, experience: Experience, scores: TokenScores
    ) -> OffsetActions:
        # the log-ratios and weights of offsets
        log_ratios_BUN, weights_BUN, starts_BU, tokens_BU = offset_log_ratios(
            log_ratios,
            experience.mask_BT,
            self._betas(log_ratios),
            stride=self.stride,
            tail=self.tail,
        )
        # their advantages: the first token's, and those of the later ones
        advantages_BUN = torch.cat(
            [experience.advantages_BT[..., None], self._later_advantages(experience, scores)], -1
        )
        # one action for each offset
        shape = log_ratios_BUN.shape
        actions = Actions(
            log_ratios_BUN.flatten(1),
            advantages_BUN.flatten(1),
            starts_BU[..., None].expand(shape).flatten(1),
            tokens_BU[..., None].expand(shape).flatten(1),
        )
        return OffsetActions(actions, weights_BUN)

    def _later_advantages(self, experience: Experience, scores: TokenScores) -> Tensor:
        """Return the advantages of offsets 1 … M, `[B, T, M]`."""
        if self.credit is None or experience.future_advantages_BT is None:
            raise RuntimeError("the tokens of a block have one advantage")
        # with one update per rollout the policy is its own old policy
        old_BT, old_future_BTM = experience.old_logprobs_BT, experience.old_future_BTM
        old_BT = scores.logprobs_BT.detach() if old_BT is None else old_BT
        if old_future_BTM is None and scores.future_BTM is not None:
            old_future_BTM = scores.future_BTM.detach()
        assert old_future_BTM is not None
        return self.credit.by_offset(experience.future_advantages_BT, old_future_BTM, old_BT)

    def _betas(self, log_ratios: Tensor) -> Tensor:
        return torch.tensor(self.weights_N, dtype=log_ratios.dtype, device=log_ratios.device)
