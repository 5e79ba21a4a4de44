"""The surrogate whose clip depends on the position in a response (docs/algorithms.md 5.7)."""

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
    """The clip of PPO on the log-ratio, with a range that depends on the position (CTPO).

        -min(R·A, exp(clip(log R, -low·t^p, high·t^p))·A)       t: the action's number, from 1

    arXiv:2605.07331 [P, abstract; C, the authors' code]; docs/algorithms.md 5.7. With
    `PrefixActions` use p = 1/2, as the spread of the log-ratio grows like √t. With its geometric
    mean the authors' code recommends p = -1/2 [C]. Other action spaces are our generalisation [I].

    Args:
        low: largest fall of the log-ratio of a response's first action, nats, positive; 0.025 [C].
        high: largest rise of this log-ratio, nats, positive; 0.05 [C].
        dual: largest rise where the advantage is negative, nats, positive; 0.05 [C]. Above it a bad
            action has no gradient. None: no bound.
        power: p, exponent of t, from -1 to 1; 0.5 [C]. With 0 all positions have the same clip.

    Raises:
        UserError: an option is out of range.
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
