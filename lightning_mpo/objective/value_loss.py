"""The loss term of a critic: how values are fitted to returns (docs/algorithms.md 10)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_mpo.checks import not_below, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.functional.values import explained_variance, value_errors
from lightning_mpo.objective.advantages import Advantage
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.terms import LossBatch, LossTerm
from lightning_mpo.scores import Metrics, ScoreRequest


@dataclass(frozen=True)
class ValueLoss(LossTerm):
    """Fits the critic to the returns (PPO2's clipped form [C]; docs/algorithms.md 10).

        coef · mean_t ½ max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²)

    Args:
        coef: factor. TRL takes 0.1; it weighs the loss in a trunk that policy and critic share,
            while under Adam the critic's own weights hardly depend on it.
        clip: how far a value may move from the one at rollout weights, in units of reward; None:
            freely. TRL takes 0.2, verl and OpenRLHF 0.5.
    """

    coef: float = 0.1
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        not_below("ValueLoss", 0, coef=self.coef)
        positive("ValueLoss", clip=self.clip, note="; null clips nothing")

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(values=True)

    def check_with(self, axes: Axes) -> None:
        if not axes[Advantage].needs_values:
            raise UserError(
                f"`ValueLoss` fits values that `{type(axes[Advantage]).__name__}` does not use; "
                "take it out of "
                "`objective.terms`, or set `advantage: GeneralizedAdvantage`"
            )

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        values_BT, experience = batch.scores.values_BT, batch.experience
        if values_BT is None:
            return None
        if experience.returns_BT is None or experience.values_BT is None:
            raise RuntimeError("`ValueLoss` needs values and returns in its experience")
        errors_BT = self.errors(values_BT, experience.values_BT, experience.returns_BT)
        metrics = self.measure(errors_BT, values_BT, experience.returns_BT, batch.weights_BT)
        return self.coef * batch.mean(errors_BT), metrics

    def errors(self, values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor) -> Tensor:
        """Return the error of each token, unreduced."""
        return value_errors(values_BT, old_BT, returns_BT, clip=self.clip)

    def measure(
        self, errors_BT: Tensor, values_BT: Tensor, returns_BT: Tensor, tokens_BT: Tensor
    ) -> Metrics:
        """Return the critic's metrics, as (sum, count) over tokens: see `finish`."""
        values_BT = values_BT.detach()
        squares_BT = (values_BT - returns_BT).square()
        measured = {
            "value/error": squares_BT,
            "value/mean": values_BT,
            "value/return": returns_BT,
            "value/return_square": returns_BT.square(),
        }
        # where the clipped error is the larger one, the value learns nothing
        if self.clip is not None:
            measured["value/clip_fraction"] = (errors_BT.detach() > 0.5 * squares_BT).to(squares_BT)
        return {
            name: (weighted_sum(part_BT, tokens_BT, 1.0), tokens_BT.sum())
            for name, part_BT in measured.items()
        }

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """Return an update's metrics with the explained variance, which is no mean over tokens."""
        rest = {name: value for name, value in means.items() if name != "value/return_square"}
        explained = explained_variance(
            means["value/error"],
            means["value/mean"],
            means["value/return"],
            means["value/return_square"],
        )
        return rest | {"value/explained_variance": explained}
