"""Axis "action space": over which tokens one importance ratio is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import actions as F


@dataclass(frozen=True)
class Actions:
    """Actions of a batch; an action stands at the position of its first token."""

    log_ratios_BU: Tensor  # nats, carries gradient
    advantages_BU: Tensor  # of the action's first token
    mask_BU: Tensor  # bool, True only where an action starts
    weights_BU: Tensor  # tokens that the action stands for; they sum to the response tokens


class ActionSpace(ABC):
    """Groups tokens into actions. Nothing after it knows the granularity."""

    token_level: ClassVar[bool] = False
    """True where every action is one token, so that probabilities of actions are those of tokens."""

    @abstractmethod
    def group(
        self, log_ratios_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn token log-ratios into `(log_ratios_BU, mask_BU, weights_BU)`."""

    def segment(self, responses_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
        """Number the actions of each response, once per rollout; None where the space needs no numbering."""
        return None

    def actions(
        self, log_ratios_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> Actions:
        """Group token log-ratios; an action takes the advantage of its first token."""
        log_ratios_BU, mask_BU, weights_BU = self.group(log_ratios_BT, mask_BT, segments_BT)
        return Actions(log_ratios_BU, advantages_BT, mask_BU, weights_BU)

    def weights(self, mask_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Return the tokens each action stands for, which depend on the mask alone. Shape `[B, U]`."""
        return self.group(torch.zeros_like(mask_BT, dtype=torch.float32), mask_BT, segments_BT)[2]


class TokenActions(ActionSpace):
    """Every token is an action: PPO, GRPO, DAPO."""

    token_level: ClassVar[bool] = True

    def group(
        self, log_ratios_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return log_ratios_BT, mask_BT, mask_BT.float()


class BlockWeights(ABC):
    """The weights beta_0 … beta_{N-1} of a block's token log-ratios; they sum to 1."""

    @abstractmethod
    def weights(self, length: int) -> list[float]:
        """Return one weight per offset."""


class FutureShare(BlockWeights):
    """`beta_0 = 1 - share`, the other offsets share the rest evenly: MPO-10 … MPO-40 [S, core spec 1.1 row 10; I].

    Args:
        share: weight of the future tokens, probability in [0, 1); 0.2 by default [I].
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 <= share < 1:
            raise UserError(f"`FutureShare.share` must be in [0, 1), got {share}")
        self.share = share

    def weights(self, length: int) -> list[float]:
        return F.block_weights(length, self.share).tolist()


class GeometricDecay(BlockWeights):
    """`beta_n ∝ decay^n`, closest to the log-COP-TD discount that inspired the paper [I, core spec 1.4].

    Args:
        decay: factor from one offset to the next, in (0, 1]; 1 gives uniform weights.
    """

    def __init__(self, decay: float = 0.5) -> None:
        if not 0 < decay <= 1:
            raise UserError(f"`GeometricDecay.decay` must be in (0, 1], got {decay}")
        self.decay = decay

    def weights(self, length: int) -> list[float]:
        return F.geometric_weights(length, self.decay).tolist()


class ExplicitWeights(BlockWeights):
    """The weights as given, not normalised: all ones give the exact product of the ratios (Eq. 11).

    Args:
        values: one weight per offset.
    """

    def __init__(self, values: list[float]) -> None:
        if any(value < 0 for value in values) or not any(values):
            raise UserError(f"`ExplicitWeights.values` must be non-negative and not all 0, got {values}")
        self.values = values

    def weights(self, length: int) -> list[float]:
        if len(self.values) != length:
            raise UserError(
                f"`ExplicitWeights.values` must have one weight per offset ({length}), got {len(self.values)}"
            )
        return list(self.values)


class BlockActions(ActionSpace):
    """N consecutive tokens are one action: `R_t = exp(sum_n beta_n · ell_n(t))` (MPO, Eq. 12-like [I]).

    With `source="backbone"` the log-ratios of later offsets are the policy's own, shifted; that is an ablation, not
    the paper's MPO, whose offsets come from multi-token-prediction heads.

    Args:
        length: N, tokens per block, the current one included [I]; 1 is the token-level method.
        weights: the betas.
        stride: 1 slides the window over every token (default [I]); N cuts disjoint blocks.
        tail: what stands for offsets past the end: "absorb" counts them as ratio 1, "renorm" rescales the weights
            of the offsets that are left. None takes absorb at stride 1 and renorm at stride N.
        source: where the log-ratios of later offsets come from.
    """

    def __init__(
        self,
        weights: BlockWeights,
        length: int = 3,
        stride: int = 1,
        tail: Literal["absorb", "renorm"] | None = None,
        source: Literal["backbone"] = "backbone",
    ) -> None:
        if length < 1:
            raise UserError(f"`BlockActions.length` must be at least 1, got {length}")
        if stride not in (1, length):
            raise UserError(f"`BlockActions.stride` must be 1 or the block length {length}, got {stride}")
        self.length, self.stride, self.tail, self.source = length, stride, tail, source
        self.weights_N = weights.weights(length)

    def group(
        self, log_ratios_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights_N = torch.tensor(self.weights_N, dtype=log_ratios_BT.dtype, device=log_ratios_BT.device)
        return F.block_log_ratios(log_ratios_BT, mask_BT, weights_N, stride=self.stride, tail=self.tail)


class SequenceActions(ActionSpace):
    """The whole response is one action: GSPO.

    Args:
        mean: True takes the length-normalised ratio `exp(mean_t ell_t)` (GSPO), False the product (RLOO's form).
    """

    def __init__(self, mean: bool = True) -> None:
        self.mean = mean

    def group(
        self, log_ratios_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return F.sequence_log_ratios(log_ratios_BT, mask_BT, mean=self.mean)
