"""An algorithm: one member of each axis, composed into a loss."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.objective import loss_metrics
from lightning_mpo.objective.action_spaces import ActionSpace, TokenActions
from lightning_mpo.objective.advantages import Advantage, GroupRelative
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.corrections import Correction
from lightning_mpo.objective.decoupled import DecoupledRelative
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.first_tokens import FirstTokens
from lightning_mpo.objective.head_policy_loss import HeadPolicyLoss
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.objective.linear_bound import LinearBound
from lightning_mpo.objective.log_ratios import group_terms, token_log_ratios, token_terms
from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.preferences import PairwiseLogistic, Preferences
from lightning_mpo.objective.reductions import Reduction, SequenceMean
from lightning_mpo.objective.selection import AllTokens, Selection
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.objective.surrogates import ClippedRatio, Surrogate
from lightning_mpo.objective.terms import LossBatch, LossTerm
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.objective.trust_metrics import diagnose_trust
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.scores import Denominators, Metrics, ScoreRequest, TokenScores
from lightning_mpo.types import Experience

FOUND_BY_NAME = (
    *(BlockActions, CoupledTokens, DecoupledRelative, DivergenceMask, ForwardTraceActions),
    *(FirstTokens, HeadPolicyLoss, KLPenalty, LinearBound, MeanField, PairwiseLogistic),
    *(PositionClip, Preferences, PrefixActions, ValueLoss),
)
"""Members in files of their own: a configuration names classes whose files are imported."""
Term = TypeVar("Term", bound=LossTerm)


@dataclass(frozen=True)
class Objective:
    """Composes the axes into a loss; without arguments it is GRPO.

    Args:
        support: over which part of the vocabulary the softmax is taken.
        actions: over which tokens one importance ratio is taken.
        advantage: how good the action was.
        surrogate: how far the policy may move.
        selection: which tokens carry gradient.
        reduction: what is averaged over what.
        correction: weights for a sampler whose log-probs differ from the trainer's, or none.
        likelihood: how a masked language model scores a response; None: the model is causal.
        terms: further terms of the loss, such as `KLPenalty`, added in their order; one of a class.
    """

    support: Support = FullVocabulary()
    actions: ActionSpace = TokenActions()
    advantage: Advantage = GroupRelative()
    surrogate: Surrogate = ClippedRatio()
    selection: Selection = AllTokens()
    reduction: Reduction = SequenceMean()
    correction: Correction | None = None
    likelihood: Likelihood | None = None
    terms: Sequence[LossTerm] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", terms := tuple(self.terms or ()))
        kinds = [type(term) for term in terms]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise UserError(f"`objective.terms` has two terms `{kind.__name__}`; give one")
        optional = [member for member in (self.correction, self.likelihood) if member is not None]
        Axes(
            *(*terms, self.advantage, self.surrogate, self.selection, *optional),
            *(self.support, self.actions, self.reduction),
        ).check()

    @classmethod
    def from_file(cls, *names: str | Path, max_new_tokens: int | None = None) -> Objective:
        """Return the objective of a recipe, such as "grpo", or of a configuration file.

        Args:
            names: of recipes, or paths; later ones overlay earlier ones, key by key, as with `-c`.
            max_new_tokens: longest response, for algorithms that depend on it (`dr_grpo`); None:
                that of the files.

        Raises:
            UserError: a file is missing, no file sets an objective, or an option is wrong.

        Example:
            >>> Objective.from_file("grpo").reduction.__class__.__name__
            'SequenceMean'
        """
        # a module above this one, hence no import at the top
        parser = importlib.import_module("lightning_mpo.cli.objective_files")
        return parser.read_objective(names, max_new_tokens)

    def describe(self) -> str:
        """Return the objective in one line, each axis with its options."""
        axes = {item.name: getattr(self, item.name) for item in fields(self)}
        axes["terms"] = ", ".join(map(repr, self.terms)) or None
        return " | ".join(
            f"{name} {'none' if member is None else member}" for name, member in axes.items()
        )

    def term(self, kind: type[Term]) -> Term | None:
        """Return the loss term of a class, or None."""
        return next((term for term in self.terms if isinstance(term, kind)), None)

    @property
    def needs_entropy(self) -> bool:
        """Whether an axis uses entropies at rollout weights."""
        return any(axis.needs_entropy for axis in (self.actions, self.selection, self.surrogate))

    @property
    def needs_behaviour(self) -> bool:
        """Whether the loss uses the sampler's log-probs; otherwise only the parity gate compares
        them.
        """
        replays = self.likelihood is not None and self.likelihood.needs_steps
        return self.surrogate.at_behaviour or self.correction is not None or replays

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen reference must score each rollout."""
        return self.surrogate.at_reference or any(term.needs_reference for term in self.terms)

    @property
    def changes_rewards(self) -> bool:
        """Whether a term changes the rewards of single tokens."""
        return any(term.in_reward for term in self.terms)

    def check_group(self, group_size: int) -> None:
        """Refuse a number of completions per prompt that leaves an axis nothing to compare.

        Raises:
            UserError: names the axis and the least number.
        """
        self.advantage.check(group_size)
        self.actions.check_group(group_size)

    def denominators(self, experience: Experience) -> Denominators:
        """Return these rows' part of the denominators; they do not depend on scores of the
        policy.
        """
        mean_weights_BU, mean_weights_BT = self._mean_weights(experience)
        learnt_BT = experience.advantages_BT != 0
        if experience.future_advantages_BT is not None:
            learnt_BT = learnt_BT | (experience.future_advantages_BT != 0)
        credited = (learnt_BT & (experience.token_weights_BT * experience.mask_BT != 0)).sum()
        tokens = self.reduction.denominator(mean_weights_BT)
        return Denominators(
            self.reduction.denominator(mean_weights_BU), tokens, credited.to(tokens)
        )

    def nothing_to_learn(self, denominators: Denominators) -> bool:
        """Whether the gradient is zero: no token carries loss, or all advantages are 0 and no other
        loss term is on.
        """
        others = any(term.learns_alone for term in self.terms)
        return not bool(denominators.tokens) or not (bool(denominators.credited) or others)

    def _mean_weights(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return the weights in the denominators: per action and per token."""
        if self.selection.averages_over_all_tokens:
            mean_weights_BT = experience.whole_mask_BT.to(experience.token_weights_BT)
            return mean_weights_BT, mean_weights_BT
        weights_BU = self.actions.token_counts(experience.mask_BT, experience.segments_BT)
        tokens_BT = experience.token_weights_BT * experience.mask_BT
        return self._weigh(weights_BU, experience), tokens_BT

    def _weigh(self, weights_BU: Tensor, experience: Experience) -> Tensor:
        """Multiply by the token weights of selection and advantage, if an action is one token."""
        return weights_BU * experience.token_weights_BT if self.actions.token_level else weights_BU

    @property
    def request(self) -> ScoreRequest:
        """What the loss needs from the policy."""
        axes = ScoreRequest(future=self.actions.future, candidates=self.surrogate.candidates > 0)
        return reduce(or_, (term.request for term in self.terms), axes)

    def loss(
        self, experience: Experience, scores: TokenScores, denominators: Denominators
    ) -> tuple[Tensor, Metrics]:
        """Return these rows' part of the mini-batch loss, and metrics.

        Args:
            experience: a micro-batch.
            scores: of the current policy.
            denominators: of the whole mini-batch; parts over its micro-batches and ranks add up to
                its loss.
        """
        # the surrogate over actions
        loss, metrics = self.surrogate_loss(experience, scores, denominators)
        mean_weights_BT = self._mean_weights(experience)[1]
        tokens_BT = experience.token_weights_BT * experience.mask_BT
        metrics["loss/surrogate"] = (loss.detach(), torch.ones(()))
        metrics |= loss_metrics.diagnose_policy(experience, scores, tokens_BT, self.likelihood)

        # further terms, which share the denominator of tokens
        def mean(values_BT: Tensor) -> Tensor:
            return self._reduce(values_BT, tokens_BT, mean_weights_BT, denominators.tokens)

        batch = LossBatch(experience, scores, tokens_BT, mean)
        for term in self.terms:
            part = term.loss(batch)
            if part is not None:
                loss = loss + part[0]
                metrics |= part[1]
        return loss, metrics

    def weights_loss(self, policy: nn.Module) -> tuple[Tensor | None, Metrics]:
        """Return the loss of the policy's weights, which an update holds once, and metrics.

        Args:
            policy: the trained module.
        """
        loss: Tensor | None = None
        metrics: Metrics = {}
        for term in self.terms:
            part = term.weights_loss(policy)
            if part is not None:
                loss = part[0] if loss is None else loss + part[0]
                metrics |= part[1]
        return loss, metrics

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """Return an update's metrics, completed by those that are no means over tokens."""
        for term in self.terms:
            means = term.finish(means)
        return means

    def surrogate_loss(
        self, experience: Experience, scores: TokenScores, denominators: Denominators
    ) -> tuple[Tensor, Metrics]:
        """Return the surrogate's part of `loss`, without loss terms, and its metrics.

        The arguments are those of `loss`.
        """
        mean_weights_BU = self._mean_weights(experience)[0]
        # tokens -> actions, without the heads that only a loss term uses
        scores = scores if self.actions.future else replace(scores, future_BTM=None)
        mask_BT = experience.mask_BT
        log_ratios, old_BT = token_log_ratios(experience, scores)
        bounded = self.surrogate.bound(log_ratios, experience.advantages_BT)
        actions = self.actions.actions(
            bounded, experience.advantages_BT, mask_BT, experience.segments_BT
        )
        if self.actions.token_level:
            actions = replace(
                actions,
                weights_BU=self._weigh(actions.weights_BU, experience),
                tokens=token_terms(experience, scores, old_BT),
            )
        if self.surrogate.at_reference:
            actions = replace(actions, group=group_terms(self.actions, experience, scores))
        # losses of actions -> their mean
        if experience.future_advantages_BT is None:
            losses_BU = self.surrogate.loss(actions)
        else:
            offsets = self.actions.offsets(bounded, experience, scores)
            losses_BUN = self.surrogate.loss(offsets.actions).view_as(offsets.weights_BUN)
            losses_BU = (offsets.weights_BUN * losses_BUN).sum(-1)
        if actions.factors_BU is not None:
            losses_BU = losses_BU * actions.factors_BU
        losses_BU = torch.where(actions.mask_BU, losses_BU, 0.0)
        if experience.correction_BT is not None:
            losses_BU = losses_BU * experience.correction_BT
        loss = self._reduce(losses_BU, actions.weights_BU, mean_weights_BU, denominators.actions)
        # metrics
        metrics = loss_metrics.diagnose(actions) | diagnose_trust(
            self.surrogate, self.actions.token_level, actions, log_ratios, bounded, experience
        )
        if experience.correction_BT is not None:
            metrics |= loss_metrics.diagnose_correction(experience.correction_BT, mask_BT)
        if scores.future_BTM is not None:
            future_BTM = scores.future_BTM.detach()
            metrics |= loss_metrics.diagnose_heads(log_ratios.detach(), future_BTM, mask_BT)
        return loss, metrics

    def _reduce(
        self, values_BU: Tensor, weights_BU: Tensor, mean_weights_BU: Tensor, denominator: Tensor
    ) -> Tensor:
        coefficients_BU = self.reduction.coefficients(weights_BU, mean_weights_BU)
        return weighted_sum(values_BU, coefficients_BU, denominator.clamp(min=1e-8))
