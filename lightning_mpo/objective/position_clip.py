"""The surrogate whose clip grows with the position in a response (docs/algorithms.md 5.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mpo.checks import finite, positive
from lightning_mpo.functional.position_clips import outside_position_clip, position_clip
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.surrogates import Surrogate


@dataclass(frozen=True)
class PositionClip(Surrogate):
    """`-min(R·A, exp(clip(log R, -low·t^p, high·t^p))·A)`: the clip of PPO in nats, scaled with the
    action's number t within its response (CTPO).

    arXiv:2605.07331 [P, abstract; C, the authors' code]; docs/algorithms.md 5.7. Over
    `PrefixActions` the exponent 1/2 follows the growth of the log-ratio's spread; over its
    geometric mean the authors' code recommends -1/2 [C]. Other action spaces are a generalisation
    of ours [I].

    Args:
        low: how far the log-ratio of a response's first action may fall, nats, positive; 0.025 [C].
        high: how far it may rise, nats, positive; 0.05 [C].
        dual: cap on that log-ratio where the advantage is negative, nats, positive; 0.05 [C]. At
            `high` it also stops bad actions that have become likelier. None: no cap.
        power: p, exponent of t, from -1 to 1; 0.5 [C], 0 is one clip for all positions.
    """

    low: float = 0.025
    high: float = 0.05
    dual: float | None = 0.05
    power: float = 0.5

    def __post_init__(self) -> None:
        positive("PositionClip", low=self.low, high=self.high, dual=self.dual)
        finite("PositionClip", most=1, power=self.power)

    def loss(self, actions: Actions) -> Tensor:
        return position_clip(
            actions.log_ratios_BU, actions.advantages_BU, _positions(actions), **self._options()
        )

    def clipped(self, actions: Actions) -> Tensor:
        outside_BU = outside_position_clip(
            actions.log_ratios_BU.detach(),
            actions.advantages_BU,
            _positions(actions),
            **self._options(),
        )
        return outside_BU & actions.mask_BU

    def _options(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "dual": self.dual, "power": self.power}


def _positions(actions: Actions) -> Tensor:
    """Number the actions of each response from 1."""
    return actions.mask_BU.to(actions.log_ratios_BU).cumsum(1)
