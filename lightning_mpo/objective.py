"""An algorithm: one member of each axis, composed into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.action_spaces import Actions, ActionSpace
from lightning_mpo.advantages import Advantage
from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.functional.divergences import k3
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.functional.surrogates import safe_ratio
from lightning_mpo.kl import KLPenalty
from lightning_mpo.reductions import Reduction
from lightning_mpo.selection import Selection
from lightning_mpo.supports import FullVocabulary, Support
from lightning_mpo.surrogates import Surrogate
from lightning_mpo.types import Experience
from lightning_mpo.value_loss import ValueLoss

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name, (sum of value·weight, sum of weight): what adds up over micro-batches and ranks."""


@dataclass(frozen=True)
class ScoreRequest:
    """What an objective needs to know of each response token besides its log-prob and entropy."""

    entropy_grad: bool = False  # whether the entropy carries gradient
    future: int = 0  # M, offsets to score with multi-token heads
    upkeep: bool = False  # the same once more, with the trunk detached
    values: bool = False  # the critic's values
    support_logits: bool = False  # all logits of the stored support


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of a micro-batch's response tokens, under temperature and stored support."""

    logprobs_BT: Tensor  # float32 nats, carries gradient, 0 where masked
    entropy_BT: Tensor  # float32 nats
    future_BTM: Tensor | None = None  # log q_n(o_{t+n} | h_t), n = 1 … M; 0 where the window has left the mask
    upkeep_BTM: Tensor | None = None  # the same values; their gradient stays in the heads
    values_BT: Tensor | None = None  # the critic's, 0 where masked
    support_logits_BTK: Tensor | None = None  # temperature applied, 0 in slots and at positions that are masked
    on_support: bool = False  # whether the softmax was taken over stored supports


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Put scores of consecutive rows together."""
    joined: dict[str, Any] = {}
    for item in fields(TokenScores):
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return TokenScores(**joined)


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
class HeadUpkeep:
    """Keeps multi-token heads on the drifting policy: cross-entropy on its own samples, trunk detached.

        coef · (1/M) · Σ_n mean_t -log q_n(o_{t+n} | h_t)            (core-algorithms 1.5, the warm-up loss [S])

    Whether MPO trains its heads during reinforcement learning is not known; small and detached is our choice [I].

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.1


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
        upkeep: what keeps multi-token heads on the policy, or none.
        critic: loss of the critic, or none.
    """

    support: Support
    actions: ActionSpace
    advantage: Advantage
    surrogate: Surrogate
    selection: Selection
    reduction: Reduction
    bonus: EntropyBonus | None = None
    kl: KLPenalty | None = None
    upkeep: HeadUpkeep | None = None
    critic: ValueLoss | None = None

    def __post_init__(self) -> None:
        if self.surrogate.needs_token_actions and not self.actions.token_level:
            raise UserError(
                f"`{type(self.surrogate).__name__}` needs probabilities of single tokens and has no meaning over "
                f"`{type(self.actions).__name__}`; use `actions: TokenActions`"
            )
        if self.upkeep is not None and not self.actions.future:
            raise UserError(
                f"`upkeep` trains multi-token heads, but `{type(self.actions).__name__}` uses none; set "
                "`upkeep: null`, or `source: mtp` in `BlockActions`"
            )
        if self.advantage.needs_values and self.critic is None:
            raise UserError(
                f"`{type(self.advantage).__name__}` takes a critic's values; give `critic: {{coef: 0.1, clip: 0.2}}`"
            )
        if self.critic is not None and not self.advantage.needs_values:
            raise UserError(
                f"`critic` fits values that `{type(self.advantage).__name__}` does not use; set `critic: null`, or "
                "`advantage: GeneralizedAdvantage`"
            )

        if self.kl is not None and self.kl.estimator == "exact" and isinstance(self.support, FullVocabulary):
            raise UserError(
                "`KLPenalty.estimator: exact` sums over a support, and `objective.support` is FullVocabulary; give a "
                "support such as TopK, or `estimator: k3`"
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

    @property
    def request(self) -> ScoreRequest:
        """What the loss needs from the policy."""
        return ScoreRequest(
            entropy_grad=self.bonus is not None and self.bonus.coef != 0,
            future=self.actions.future,
            upkeep=self.upkeep is not None and self.upkeep.coef != 0,
            values=self.critic is not None,
            support_logits=self.kl is not None and self.kl.estimator == "exact",
        )

    def loss(self, experience: Experience, scores: TokenScores, denominators: Denominators) -> tuple[Tensor, Metrics]:
        """Return these rows' part of the mini-batch loss, and metrics.

        Args:
            experience: a micro-batch.
            scores: of the current policy.
            denominators: of the whole mini-batch; parts over its micro-batches and ranks add up to its loss.
        """
        loss, metrics = self._surrogate(experience, scores, denominators)
        tokens_BT = experience.token_weights_BT * experience.mask_BT
        count = tokens_BT.sum()
        metrics["loss/surrogate"] = (loss.detach(), torch.ones(()))
        metrics["policy/entropy"] = ((scores.entropy_BT.detach() * tokens_BT).sum(), count)

        def mean(values_BT: Tensor) -> Tensor:
            return self._reduce(values_BT, tokens_BT, denominators.tokens)

        if self.bonus is not None and self.bonus.coef:
            loss = loss - self.bonus.coef * mean(scores.entropy_BT)
        reference_BT = experience.reference_logprobs_BT
        if reference_BT is not None:
            if self.kl is not None and self.kl_in_loss:
                divergence_BT = self.kl.divergence(
                    scores.logprobs_BT,
                    reference_BT,
                    scores.support_logits_BTK,
                    experience.reference_logits_BTK,
                    experience.rollout.support_mask_BTK,
                )
                loss = loss + self.kl.controller.coefficient * mean(divergence_BT)
            metrics["kl/reference"] = (
                weighted_sum(k3(scores.logprobs_BT.detach(), reference_BT), tokens_BT, 1.0),
                count,
            )
        if self.upkeep is not None and scores.upkeep_BTM is not None:
            loss = loss - self.upkeep.coef * mean(scores.upkeep_BTM.mean(-1))
        if self.critic is not None and scores.values_BT is not None:
            if experience.returns_BT is None or experience.values_BT is None:
                raise RuntimeError("an objective with a critic needs values and returns in its experience")
            errors_BT = self.critic.errors(scores.values_BT, experience.values_BT, experience.returns_BT)
            loss = loss + self.critic.coef * mean(errors_BT)
            metrics |= self.critic.measure(errors_BT, scores.values_BT, experience.returns_BT, tokens_BT)
        return loss, metrics

    def _surrogate(
        self, experience: Experience, scores: TokenScores, denominators: Denominators
    ) -> tuple[Tensor, Metrics]:
        mask_BT = experience.mask_BT
        now = _offsets(scores.logprobs_BT, scores.future_BTM)
        if experience.old_logprobs_BT is None:
            old = now.detach()
        else:
            old = _offsets(experience.old_logprobs_BT, None if now.ndim == 2 else experience.old_future_BTM)
        log_ratios = torch.where(mask_BT if now.ndim == 2 else mask_BT[..., None], now - old, 0.0)
        actions = self.actions.actions(log_ratios, experience.advantages_BT, mask_BT, experience.segments_BT)
        losses_BU = torch.where(actions.mask_BU, self.surrogate.loss(actions), 0.0)
        loss = self._reduce(losses_BU, actions.weights_BU, denominators.actions)
        metrics = _diagnose(actions)
        clipped_BU = self.surrogate.clipped(actions)
        if clipped_BU is not None:
            metrics["ratio/clip_fraction"] = (clipped_BU.sum().float(), actions.mask_BU.sum().float())
        token_BT = log_ratios.detach() if log_ratios.ndim == 2 else log_ratios[..., 0].detach()
        if clipped_BU is not None and not self.actions.token_level:
            tokens = Actions(token_BT, experience.advantages_BT, mask_BT, mask_BT.float())
            metrics["ratio/token_clip_fraction"] = (self.surrogate.clipped(tokens).sum().float(), mask_BT.sum().float())  # type: ignore[union-attr]
        metrics["kl/old"] = ((k3(token_BT, torch.zeros_like(token_BT)) * mask_BT).sum(), mask_BT.sum().float())
        if scores.future_BTM is not None:
            metrics |= _diagnose_heads(log_ratios.detach(), scores.future_BTM.detach(), mask_BT)
        return loss, metrics

    def _reduce(self, values_BU: Tensor, weights_BU: Tensor, denominator: Tensor) -> Tensor:
        return weighted_sum(values_BU, self.reduction.coefficients(weights_BU), denominator.clamp(min=1e-8))


def _offsets(logprobs_BT: Tensor, future_BTM: Tensor | None) -> Tensor:
    """Put the heads' offsets behind the token's own: `[B, T, 1 + M]`, or `[B, T]` without heads."""
    return logprobs_BT if future_BTM is None else torch.cat([logprobs_BT[..., None], future_BTM], -1)


def _diagnose(actions: Actions) -> Metrics:
    log_ratios_BU, mask_BU = actions.log_ratios_BU.detach(), actions.mask_BU
    ratio_BU = safe_ratio(log_ratios_BU)
    starts = mask_BU.sum().float()
    return {
        "ratio/mean": ((ratio_BU * mask_BU).sum(), starts),
        "ratio/abs_log": ((log_ratios_BU.abs() * mask_BU).sum(), starts),
        "ratio/tokens_per_action": ((actions.weights_BU * mask_BU).sum(), starts),
    }


def _diagnose_heads(log_ratios_BTN: Tensor, future_BTM: Tensor, mask_BT: Tensor) -> Metrics:
    """By offset n: the heads' cross-entropy in nats, and the size of their log-ratio."""
    metrics: Metrics = {}
    for n in range(1, log_ratios_BTN.shape[-1]):
        alive_BT = window(mask_BT, n)
        count = alive_BT.sum().float()
        metrics[f"heads/cross_entropy_{n}"] = (-(future_BTM[..., n - 1] * alive_BT).sum(), count)
        metrics[f"heads/abs_log_ratio_{n}"] = ((log_ratios_BTN[..., n].abs() * alive_BT).sum(), count)
    return metrics


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
