"""Rules for objectives of masked language models (docs/algorithms.md 17.6).

Members that need the chain rule are refused.
"""

from __future__ import annotations

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import ActionSpace, SequenceActions
from lightning_mpo.objective.advantages import Advantage
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.corrections import Correction
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.selection import AllTokens, Selection
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.objective.surrogates import Surrogate
from lightning_mpo.objective.terms import EntropyBonus, LossTerm
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions


def check_masked(name: str, axes: Axes, *, tokens: bool, steps: bool) -> None:
    """Refuse members that have no meaning beside a likelihood of masked models.

    Args:
        name: of the likelihood.
        axes: all members of the objective.
        tokens: whether log-probs of single tokens have a meaning; otherwise only their sums do.
        steps: whether the likelihood replays the steps of the sampler.

    Raises:
        UserError: a member is refused; the message names it, the likelihood and an alternative.
    """
    _check_actions(name, axes, tokens=tokens, steps=steps)
    _check_credit(name, axes)
    _check_samples(name, axes, steps=steps)
    _check_surrogate(name, axes, tokens=tokens, steps=steps)
    _check_terms(name, axes, tokens=tokens)


def _check_actions(name: str, axes: Axes, *, tokens: bool, steps: bool) -> None:
    """Refuse heads, and actions that the likelihood has no ratio for."""
    actions = axes[ActionSpace]
    space = type(actions).__name__
    if actions.future > 0 or any(term.request.future > 0 for term in axes.all(LossTerm)):
        raise UserError(
            f"`{name}` is for masked language models, which have no multi-token heads; use "
            "`actions: TokenActions`, and no loss term of heads"
        )
    if isinstance(actions, (PrefixActions, ForwardTraceActions)):
        raise UserError(
            f"`{space}` multiplies ratios from left to right, and `{name}` is for models that "
            "reveal tokens in any order; use `actions: TokenActions` or `SequenceActions`"
        )
    if not tokens and not actions.one_per_response:
        raise UserError(
            f"`{name}` estimates the log-prob of whole responses, and `{space}` takes those of "
            "single tokens; use `actions: SequenceActions`"
        )
    if steps and not actions.token_level and not isinstance(actions, SequenceActions):
        raise UserError(
            f"`{space}` groups neighbours, and `{name}` scores the tokens of one step, which are "
            "seldom neighbours; use `actions: TokenActions` or `SequenceActions`"
        )


def _check_credit(name: str, axes: Axes) -> None:
    """Refuse advantages that differ from token to token, and the choice of tokens."""
    advantage, selection = axes[Advantage], axes[Selection]
    if advantage.to_go or advantage.weighs_tokens:
        raise UserError(
            f"`{type(advantage).__name__}` gives the tokens of a response different advantages "
            f"from left to right, and `{name}` is for models that reveal them in any order; use "
            "`advantage: GroupRelative` or `LeaveOneOut`"
        )
    if not isinstance(selection, AllTokens):
        raise UserError(
            f"`{type(selection).__name__}` chooses tokens, and `{name}` chooses them already; use "
            "`selection: AllTokens`"
        )


def _check_samples(name: str, axes: Axes, *, steps: bool) -> None:
    """Refuse members that need the sampler's supports or log-probs in other states than its own."""
    support = axes[Support]
    if not steps and not isinstance(support, FullVocabulary):
        raise UserError(
            f"`{type(support).__name__}` is stored for the steps of the sampler, and `{name}` "
            "hides tokens at random; use `likelihood: Denoising`, or `support: FullVocabulary`"
        )
    if axes.all(Correction):
        reason = (
            "takes the sampler's log-probs as the old ones"
            if steps
            else "scores rows in other states than the sampler's"
        )
        raise UserError(
            f"`correction` compares the log-probs of sampler and trainer, and `{name}` {reason}; "
            "use `correction: null`"
        )


def _check_surrogate(name: str, axes: Axes, *, tokens: bool, steps: bool) -> None:
    """Refuse surrogates that need the sampler's distributions, single tokens, or their order."""
    surrogate = axes[Surrogate]
    loss = type(surrogate).__name__
    distributions = surrogate.candidates > 0 or surrogate.needs_entropy
    if distributions or (surrogate.at_behaviour and not steps):
        raise UserError(
            f"`{loss}` compares distributions of the sampler, which `{name}` does not score; use "
            "`surrogate: ClippedRatio`"
        )
    if not tokens and type(surrogate).bound is not Surrogate.bound:
        raise UserError(
            f"`{loss}` bounds the ratios of single tokens, and `{name}` estimates the log-prob of "
            "whole responses; use `surrogate: ClippedRatio`"
        )
    if isinstance(surrogate, PositionClip):
        raise UserError(
            f"`{loss}` widens its range from left to right, and `{name}` is for models that reveal "
            "tokens in any order; use `surrogate: ClippedRatio`"
        )


def _check_terms(name: str, axes: Axes, *, tokens: bool) -> None:
    """Refuse loss terms that need a value or a divergence at each token."""
    for term in axes.all(LossTerm):
        if term.in_reward or term.request.values or term.request.support_logits:
            raise UserError(
                f"`{type(term).__name__}` needs a value or a divergence for each token from left "
                f"to right, which `{name}` does not give; use `KLPenalty` with `place: loss` and "
                "`estimator: k2` or `k3`"
            )
        if isinstance(term, EntropyBonus) and not tokens:
            raise UserError(
                f"`EntropyBonus` takes the mean entropy of single tokens, and `{name}` gives one "
                "estimate for a whole response; leave it out, or use `likelihood: Denoising`"
            )
        if isinstance(term, KLPenalty) and term.level == "sequence" and tokens:
            raise UserError(
                f"`KLPenalty.level: sequence` compares log-probs of whole responses, and `{name}` "
                "gives those of single tokens; use `level: token`"
            )
        if isinstance(term, KLPenalty) and term.level == "token" and not tokens:
            raise UserError(
                f"`KLPenalty.level: token` compares single tokens, and `{name}` estimates the "
                "log-prob of whole responses; use `level: sequence` and `estimator: k2`"
            )
