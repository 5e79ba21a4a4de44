"""An algorithm: one member of each axis, composed into a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.action_spaces import ActionSpace
from lightning_mpo.advantages import Advantage
from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k3
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.functional.surrogates import safe_ratio
from lightning_mpo.kl import KLPenalty
from lightning_mpo.reductions import Reduction
from lightning_mpo.selection import Selection
from lightning_mpo.supports import Support
from lightning_mpo.surrogates import Surrogate
from lightning_mpo.types import Experience

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name, (sum of value·weight, sum of weight): what adds up over micro-batches and ranks."""


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of a micro-batch's response tokens, under temperature and stored support."""

    logprobs_BT: Tensor  # float32 nats, carries gradient, 0 where masked
    entropy_BT: Tensor  # float32 nats


@dataclass(frozen=True)
class Denominators:
    """Of the whole mini-batch, summed over ranks: one per loss term."""

    actions: Tensor
    tokens: Tensor

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(self.actions + other.actions, self.tokens + other.tokens)


@dataclass(frozen=True)
class EntropyBonus:
    """Subtracts `coef` times the policy's entropy from the loss.

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.0


@dataclass(frozen=True)
class Objective:
    """Composes the axes.

    Args:
        support: over which part of the vocabulary the softmax is taken.
        actions: over which tokens one importance ratio is taken.
        advantage: how good the action was.
        surrogate: how far the policy may move.
        selection: which tokens carry gradient.
        reduction: what is averaged over what.
        bonus: entropy bonus, or none.
        kl: what holds the policy near its reference, or none.
    """

    support: Support
    actions: ActionSpace
    advantage: Advantage
    surrogate: Surrogate
    selection: Selection
    reduction: Reduction
    bonus: EntropyBonus | None = None
    kl: KLPenalty | None = None

    def __post_init__(self) -> None:
        if self.surrogate.needs_token_actions and not self.actions.token_level:
            raise UserError(
                f"`{type(self.surrogate).__name__}` needs probabilities of single tokens and has no meaning over "
                f"`{type(self.actions).__name__}`; use `actions: TokenActions`"
            )

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss needs reference log-probs."""
        return self.kl is not None and self.kl.place == "loss"

    def describe(self) -> str:
        """Return the objective in one line, each axis with its arguments."""
        parts = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return " | ".join(f"{name} {_describe(part)}" for name, part in parts)

    def denominators(self, experience: Experience) -> Denominators:
        """Return these rows' part of the denominators, known before any policy is asked."""
        mask_BT = experience.mask_BT
        weights_BU = self.actions.weights(mask_BT, experience.segments_BT)
        return Denominators(
            self.reduction.denominator(weights_BU),
            self.reduction.denominator(experience.token_weights_BT * mask_BT),
        )

    def loss(self, experience: Experience, scores: TokenScores, denominators: Denominators) -> tuple[Tensor, Metrics]:
        """Return these rows' part of the mini-batch loss, and metrics.

        Args:
            experience: a micro-batch.
            scores: of the current policy.
            denominators: of the whole mini-batch; parts over its micro-batches and ranks add up to its loss.
        """
        mask_BT = experience.mask_BT
        logprobs_BT = scores.logprobs_BT
        old_BT = experience.old_logprobs_BT
        log_ratios_BT = logprobs_BT - (logprobs_BT.detach() if old_BT is None else old_BT)
        log_ratios_BT = torch.where(mask_BT, log_ratios_BT, 0.0)
        actions = self.actions.actions(log_ratios_BT, experience.advantages_BT, mask_BT, experience.segments_BT)
        losses_BU = torch.where(actions.mask_BU, self.surrogate.loss(actions), 0.0)
        weights_BU = actions.weights_BU
        loss = self._reduce(losses_BU, weights_BU, denominators.actions)
        metrics: Metrics = {"loss/surrogate": (loss.detach(), torch.ones(()))}

        tokens_BT = experience.token_weights_BT * mask_BT
        count = tokens_BT.sum()
        if self.bonus is not None and self.bonus.coef:
            loss = loss - self.bonus.coef * self._reduce(scores.entropy_BT, tokens_BT, denominators.tokens)
        reference_BT = experience.reference_logprobs_BT
        if reference_BT is not None:
            if self.kl is not None and self.kl_in_loss:
                penalty_BT = self.kl.divergence(logprobs_BT, reference_BT)
                loss = loss + self.kl.controller.coefficient * self._reduce(penalty_BT, tokens_BT, denominators.tokens)
            divergence_BT = k3(logprobs_BT.detach(), reference_BT)
            metrics["kl/reference"] = (weighted_sum(divergence_BT, tokens_BT, 1.0), count)

        metrics |= self._diagnose(actions.log_ratios_BU.detach(), actions.mask_BU, weights_BU)
        clipped_BU = self.surrogate.clipped(actions)
        if clipped_BU is not None:
            metrics["ratio/clip_fraction"] = (clipped_BU.sum().float(), actions.mask_BU.sum().float())
        metrics["policy/entropy"] = ((scores.entropy_BT.detach() * tokens_BT).sum(), count)
        metrics["kl/old"] = ((k3(log_ratios_BT.detach(), torch.zeros_like(log_ratios_BT)) * tokens_BT).sum(), count)
        return loss, metrics

    def _reduce(self, values_BU: Tensor, weights_BU: Tensor, denominator: Tensor) -> Tensor:
        return weighted_sum(values_BU, self.reduction.coefficients(weights_BU), denominator.clamp(min=1e-8))

    @staticmethod
    def _diagnose(log_ratios_BU: Tensor, mask_BU: Tensor, weights_BU: Tensor) -> Metrics:
        ratio_BU = safe_ratio(log_ratios_BU)
        starts = mask_BU.sum().float()
        return {
            "ratio/mean": ((ratio_BU * mask_BU).sum(), starts),
            "ratio/abs_log": ((log_ratios_BU.abs() * mask_BU).sum(), starts),
            "ratio/tokens_per_action": ((weights_BU * mask_BU).sum(), starts),
        }


def _describe(part: Any) -> str:
    """Return `Name(argument=value, …)` from the attributes that a constructor stored."""
    if part is None:
        return "none"
    arguments = ", ".join(f"{key}={_value(value)}" for key, value in vars(part).items() if not key.startswith("_"))
    return f"{type(part).__name__}({arguments})" if arguments else type(part).__name__


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _describe(value) if type(value).__module__.startswith("lightning_mpo") else str(value)
