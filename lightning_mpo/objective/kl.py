"""The loss term that holds the policy near its reference (docs/algorithms.md 8)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_mpo.checks import at_least, not_below, one_of, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional import divergences as F
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.supports import Support
from lightning_mpo.objective.terms import LossBatch, LossTerm
from lightning_mpo.scores import Metrics, ScoreRequest


class Controller(Member):
    """Sets the coefficient of the penalty from the divergence that was measured."""

    coefficient: float

    @abstractmethod
    def update(self, divergence: float, rows: int) -> None:
        """Take the mean divergence of a rollout (nats per token) over `rows` responses."""

    def restore(self, coefficient: float) -> None:
        """Take the coefficient of a checkpoint."""
        self.coefficient = coefficient


@dataclass(frozen=True)
class ConstantCoefficient(Controller):
    """The coefficient never changes.

    Args:
        coefficient: factor of the penalty.
    """

    coefficient: float = 0.001

    def __post_init__(self) -> None:
        not_below("ConstantCoefficient", 0, coefficient=self.coefficient)

    def update(self, divergence: float, rows: int) -> None:
        return

    def restore(self, coefficient: float) -> None:
        return


@dataclass(eq=False)  # not frozen: the coefficient is state of the run, which checkpoints hold
class AdaptiveCoefficient(Controller):
    """`coef ← coef · (1 + clip(KL / target - 1, ±0.2) · min(rows / horizon, 1))`
    (docs/algorithms.md 8.4).

    After Ziegler et al., 2019 [REC].

    Args:
        coefficient: where it starts.
        target: the divergence to hold, in nats per token.
        horizon: responses over which an error of 20 % changes the coefficient by 20 %.
    """

    target: float
    coefficient: float = 0.1
    horizon: int = 10_000

    def __post_init__(self) -> None:
        positive("AdaptiveCoefficient", target=self.target)
        at_least("AdaptiveCoefficient", 1, most=10**9, horizon=self.horizon)
        positive("AdaptiveCoefficient", coefficient=self.coefficient, note=": 0 never moves")

    def update(self, divergence: float, rows: int) -> None:
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        # without the bound, a rollout far beyond the horizon would flip the coefficient's sign
        share = min(rows / self.horizon, 1.0)
        self.coefficient *= 1 + error * share


@dataclass(frozen=True)
class KLPenalty(LossTerm):
    """A penalty on the divergence from the reference, on the distribution that is sampled from.

    Args:
        controller: the coefficient, constant or adaptive.
        estimator: per token, from the sampled token, Schulman's k1, k2 or k3; or "exact", the sum
            over a stored support, policy and reference both renormalised on it [I]
            (docs/algorithms.md 8.2): no sampling noise, K logits more.
        level: "token" takes the divergence of single tokens. "sequence" takes k2 of the summed
            log-probs of a response, divided by its length (ESPO [C]).
        place: "loss" adds it to the loss; "reward" subtracts the response's sum of it from the
            reward.

    Raises:
        UserError: an unknown estimator or place; k1 in the loss, whose expected gradient is zero.
    """

    controller: Controller
    estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    level: Literal["token", "sequence"] = "token"
    needs_reference = True

    def __post_init__(self) -> None:
        one_of("KLPenalty", ("k1", "k2", "k3", "exact"), estimator=self.estimator)
        one_of("KLPenalty", ("loss", "reward"), place=self.place)
        one_of("KLPenalty", ("token", "sequence"), level=self.level)
        if self.level == "sequence" and (self.estimator != "k2" or self.in_reward):
            raise UserError(
                "`KLPenalty.level: sequence` squares the difference of summed log-probs in the "
                "loss; use `estimator: k2` and `place: loss`"
            )
        if self.estimator == "k1" and self.place == "loss":
            raise UserError(
                "`KLPenalty` with estimator k1 in the loss has an expected gradient of zero; use "
                "`estimator: k3` (or "
                "k2), or `place: reward`"
            )

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(support_logits=self.estimator == "exact")

    @property
    def in_reward(self) -> bool:
        return self.place == "reward"

    @property
    def learns_alone(self) -> bool:
        return self.place == "loss"

    def check_with(self, axes: Axes) -> None:
        if self.estimator == "exact" and axes[Support].some_whole:
            raise UserError(
                f"`KLPenalty.estimator: exact` sums over a support, and `objective.support` is "
                f"{type(axes[Support]).__name__}; give a support such as TopK, or `estimator: k3`"
            )

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        experience, scores = batch.experience, batch.scores
        if self.in_reward or experience.reference_logprobs_BT is None:
            return None
        if self.level == "sequence":
            reference_BT = experience.reference_logprobs_BT
            divergence_BT = F.response_k2(scores.logprobs_BT, reference_BT, experience.mask_BT)
            return self.controller.coefficient * batch.mean(divergence_BT), {}
        divergence_BT = self.divergence(
            scores.logprobs_BT,
            experience.reference_logprobs_BT,
            scores.support_logits_BTK,
            experience.reference_logits_BTK,
            experience.rollout.support_mask_BTK,
        )
        return self.controller.coefficient * batch.mean(divergence_BT), {}

    def divergence(
        self,
        logprobs_BT: Tensor,
        reference_logprobs_BT: Tensor,
        logits_BTK: Tensor | None = None,
        reference_logits_BTK: Tensor | None = None,
        support_mask_BTK: Tensor | None = None,
    ) -> Tensor:
        """Return the estimate per token, in nats. Shape `[B, T]`.

        Args:
            logprobs_BT: of the sampled tokens.
            reference_logprobs_BT: the same under the reference.
            logits_BTK: all logits of the stored support; only "exact" reads them.
            reference_logits_BTK: the same under the reference.
            support_mask_BTK: False for slots that hold no id; None: all hold one.
        """
        if self.estimator == "exact":
            if logits_BTK is None or reference_logits_BTK is None:
                raise RuntimeError(
                    "the exact divergence needs the support's logits of both policy and reference"
                )
            return F.exact_on_support(logits_BTK, reference_logits_BTK, support_mask_BTK)
        estimate = {"k1": F.k1, "k2": F.k2, "k3": F.k3}[self.estimator]
        return estimate(logprobs_BT, reference_logprobs_BT)
