"""An algorithm: one member of each axis, composed into a loss."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.functional.divergences import k3
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.objective.action_spaces import Actions, TokenTerms
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.loss_metrics import diagnose, diagnose_correction, diagnose_heads
from lightning_mpo.objective.rules import check_composition
from lightning_mpo.scores import Denominators, Metrics, ScoreRequest, TokenScores
from lightning_mpo.types import Experience


@dataclass(frozen=True)
class Objective(Axes):
    """Composes the axes.

    Args:
        support: over which part of the vocabulary the softmax is taken.
        actions: over which tokens one importance ratio is taken.
        advantage: how good the action was.
        surrogate: how far the policy may move.
        selection: which tokens carry gradient.
        reduction: what is averaged over what.
        correction: weights for a sampler whose log-probs differ from the trainer's, or none.
        bonus: entropy bonus, or none.
        penalty: on the size of the weights, or none.
        kl: what holds the policy near its reference, or none.
        upkeep: what keeps multi-token heads on the policy, or none.
        critic: loss of the critic, or none.
    """

    def __post_init__(self) -> None:
        check_composition(self)

    @classmethod
    def from_file(cls, *names: str | Path, max_new_tokens: int | None = None) -> Objective:
        """Return the objective of a recipe, such as "grpo", or of a configuration file.

        Args:
            names: of recipes, or paths; later ones overlay earlier ones, key by key, as with `-c`.
            max_new_tokens: longest response, for algorithms that depend on it (`dr_grpo`); None: that of the files.

        Raises:
            UserError: a file is missing, no file sets an objective, or an option is wrong.

        Example:
            >>> Objective.from_file("grpo").reduction.__class__.__name__
            'SequenceMean'
        """
        parser = importlib.import_module(
            "lightning_mpo.cli.objective_files"
        )  # a module above this one, hence no import at the top
        return parser.read_objective(names, max_new_tokens)

    def describe(self) -> str:
        """Return the objective in one line, each axis with its arguments."""
        parts = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return " | ".join(f"{name} {_describe(part)}" for name, part in parts)

    def denominators(self, experience: Experience) -> Denominators:
        """Return these rows' part of the denominators; they do not depend on scores of the policy."""
        whole_BU, whole_BT = self._whole(experience)
        credited = (
            experience.advantages_BT * experience.token_weights_BT * experience.mask_BT != 0
        ).sum()
        tokens = self.reduction.denominator(whole_BT)
        return Denominators(self.reduction.denominator(whole_BU), tokens, credited.to(tokens))

    def idle(self, denominators: Denominators) -> bool:
        """Whether the gradient is zero: no token carries loss, or all advantages are 0 and no other loss term is on."""
        others = (
            self.kl_in_loss,
            self.critic is not None,
            self.penalty is not None,
            self.bonus is not None and self.bonus.coef != 0,
            self.upkeep is not None and self.upkeep.coef != 0,
        )
        return not bool(denominators.tokens) or (
            not bool(denominators.credited) and not any(others)
        )

    def _whole(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return the weights in the denominators: per action and per token."""
        if self.selection.of_whole:
            whole_BT = experience.whole_mask_BT.to(experience.token_weights_BT)
            return whole_BT, whole_BT
        weights_BU = self.actions.weights(experience.mask_BT, experience.segments_BT)
        tokens_BT = experience.token_weights_BT * experience.mask_BT
        return self._weigh(weights_BU, experience), tokens_BT

    def _weigh(self, weights_BU: Tensor, experience: Experience) -> Tensor:
        """Multiply by the token weights of selection and advantage, if an action is one token."""
        return weights_BU * experience.token_weights_BT if self.actions.token_level else weights_BU

    @property
    def request(self) -> ScoreRequest:
        """What the loss needs from the policy."""
        return ScoreRequest(
            entropy_grad=self.bonus is not None and self.bonus.coef != 0,
            future=self.actions.future,
            upkeep=self.upkeep is not None and self.upkeep.coef != 0,
            values=self.critic is not None,
            support_logits=self.kl is not None and self.kl.estimator == "exact",
            candidates=self.surrogate.candidates > 0,
        )

    def loss(
        self, experience: Experience, scores: TokenScores, denominators: Denominators
    ) -> tuple[Tensor, Metrics]:
        """Return these rows' part of the mini-batch loss, and metrics.

        Args:
            experience: a micro-batch.
            scores: of the current policy.
            denominators: of the whole mini-batch; parts over its micro-batches and ranks add up to its loss.
        """
        whole_BU, whole_BT = self._whole(experience)
        loss, metrics = self._surrogate(experience, scores, denominators, whole_BU)
        tokens_BT = experience.token_weights_BT * experience.mask_BT
        count = tokens_BT.sum()
        metrics["loss/surrogate"] = (loss.detach(), torch.ones(()))
        metrics["policy/entropy"] = ((scores.entropy_BT.detach() * tokens_BT).sum(), count)

        def mean(values_BT: Tensor) -> Tensor:
            return self._reduce(values_BT, tokens_BT, whole_BT, denominators.tokens)

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
                raise RuntimeError(
                    "an objective with a critic needs values and returns in its experience"
                )
            errors_BT = self.critic.errors(
                scores.values_BT, experience.values_BT, experience.returns_BT
            )
            loss = loss + self.critic.coef * mean(errors_BT)
            metrics |= self.critic.measure(
                errors_BT, scores.values_BT, experience.returns_BT, tokens_BT
            )
        return loss, metrics

    def _surrogate(
        self,
        experience: Experience,
        scores: TokenScores,
        denominators: Denominators,
        whole_BU: Tensor,
    ) -> tuple[Tensor, Metrics]:
        mask_BT = experience.mask_BT
        now = _offsets(scores.logprobs_BT, scores.future_BTM)
        if experience.old_logprobs_BT is None:
            old = now.detach()
        else:
            old = _offsets(
                experience.old_logprobs_BT, None if now.ndim == 2 else experience.old_future_BTM
            )
        log_ratios = torch.where(mask_BT if now.ndim == 2 else mask_BT[..., None], now - old, 0.0)
        bounded = self.surrogate.bound(log_ratios, experience.advantages_BT)
        actions = self.actions.actions(
            bounded, experience.advantages_BT, mask_BT, experience.segments_BT
        )
        if self.actions.token_level:
            actions = replace(
                actions,
                weights_BU=self._weigh(actions.weights_BU, experience),
                tokens=_token_terms(experience, scores, old if old.ndim == 2 else old[..., 0]),
            )
        losses_BU = torch.where(actions.mask_BU, self.surrogate.loss(actions), 0.0)
        if experience.correction_BT is not None:
            losses_BU = losses_BU * experience.correction_BT
        loss = self._reduce(losses_BU, actions.weights_BU, whole_BU, denominators.actions)
        metrics = diagnose(actions) | self._diagnose_trust(actions, log_ratios, bounded, experience)
        if experience.correction_BT is not None:
            metrics |= diagnose_correction(experience.correction_BT, mask_BT)
        if scores.future_BTM is not None:
            metrics |= diagnose_heads(log_ratios.detach(), scores.future_BTM.detach(), mask_BT)
        return loss, metrics

    def _diagnose_trust(
        self, actions: Actions, log_ratios: Tensor, bounded: Tensor, experience: Experience
    ) -> Metrics:
        """Say which share of actions and of tokens the trust region stops, and how far the policy is from the old one."""
        metrics = self.surrogate.measure(actions)
        mask_BT, count = experience.mask_BT, experience.mask_BT.sum().float()
        token_BT = log_ratios.detach() if log_ratios.ndim == 2 else log_ratios[..., 0].detach()
        clipped_BU = self.surrogate.clipped(actions)
        if clipped_BU is not None:
            metrics["ratio/clip_fraction"] = (
                clipped_BU.sum().float(),
                actions.mask_BU.sum().float(),
            )
        if clipped_BU is not None and not self.actions.token_level:
            tokens = Actions(token_BT, experience.advantages_BT, mask_BT, mask_BT.float())
            metrics["ratio/token_clip_fraction"] = (
                self.surrogate.clipped(tokens).sum().float(),
                count,
            )  # type: ignore[union-attr]
        if bounded is not log_ratios:
            bounded_BT = (
                (bounded != log_ratios) if bounded.ndim == 2 else (bounded != log_ratios)[..., 0]
            )
            metrics["ratio/token_clip_fraction"] = ((bounded_BT & mask_BT).sum().float(), count)
        metrics["kl/old"] = ((k3(token_BT, torch.zeros_like(token_BT)) * mask_BT).sum(), count)
        return metrics

    def _reduce(
        self, values_BU: Tensor, weights_BU: Tensor, whole_BU: Tensor, denominator: Tensor
    ) -> Tensor:
        coefficients_BU = self.reduction.coefficients(weights_BU, whole_BU)
        return weighted_sum(values_BU, coefficients_BU, denominator.clamp(min=1e-8))


def _token_terms(experience: Experience, scores: TokenScores, old_BT: Tensor) -> TokenTerms:
    return TokenTerms(
        scores.logprobs_BT,
        old_BT,
        experience.old_entropy_BT,
        scores.candidate_logprobs_BTK,
        experience.rollout.candidate_logprobs_BTK,
    )


def _offsets(logprobs_BT: Tensor, future_BTM: Tensor | None) -> Tensor:
    """Put the heads' offsets behind the token's own: `[B, T, 1 + M]`, or `[B, T]` without heads."""
    return (
        logprobs_BT if future_BTM is None else torch.cat([logprobs_BT[..., None], future_BTM], -1)
    )


def _describe(part: Any) -> str:
    """Return `Name(argument=value, …)` from the attributes that a constructor stored."""
    if part is None:
        return "none"
    arguments = ", ".join(
        f"{key}={_value(value)}" for key, value in vars(part).items() if not key.startswith("_")
    )
    return f"{type(part).__name__}({arguments})" if arguments else type(part).__name__


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _describe(value) if type(value).__module__.startswith("lightning_mpo") else str(value)
