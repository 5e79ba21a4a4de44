"""Which members of the axes cannot stand together, each refused by name when an objective is built."""

from __future__ import annotations

from lightning_mpo.errors import UserError
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary


def check_composition(objective: Axes) -> None:
    """Refuse compositions that have no meaning.

    Raises:
        UserError: names both members and what to write instead.
    """
    _check_needs(objective)
    _check_tokens(objective)
    if objective.advantage.weighs_tokens:
        _check_credit(objective)
    _check_whole(objective)
    _check_correction(objective)


def _check_needs(objective: Axes) -> None:
    """Refuse parts that need another one, and parts that nothing uses."""
    if objective.upkeep is not None and not objective.actions.future:
        raise UserError(
            f"`upkeep` trains multi-token heads, but `{type(objective.actions).__name__}` uses none; set "
            "`upkeep: null`, or `source: mtp` in `BlockActions`"
        )
    if objective.advantage.needs_values and objective.critic is None:
        raise UserError(
            f"`{type(objective.advantage).__name__}` takes a critic's values; give `critic: {{coef: 0.1, clip: 0.2}}`"
        )
    if objective.critic is not None and not objective.advantage.needs_values:
        raise UserError(
            f"`critic` fits values that `{type(objective.advantage).__name__}` does not use; set `critic: null`, or "
            "`advantage: GeneralizedAdvantage`"
        )
    if (
        objective.kl is not None
        and objective.kl.estimator == "exact"
        and isinstance(objective.support, FullVocabulary)
    ):
        raise UserError(
            "`KLPenalty.estimator: exact` sums over a support, and `objective.support` is FullVocabulary; give a "
            "support such as TopK, or `estimator: k3`"
        )


def _check_tokens(objective: Axes) -> None:
    """Refuse what has no meaning over actions of several tokens."""
    actions, name = objective.actions, type(objective.actions).__name__
    if objective.surrogate.needs_token_actions and not actions.token_level:
        raise UserError(
            f"`{type(objective.surrogate).__name__}` needs probabilities of single tokens and has no meaning over "
            f"`{name}`; use `actions: TokenActions`"
        )
    if objective.selection.weighted and not actions.token_level:
        raise UserError(
            f"`{type(objective.selection).__name__}` weighs single tokens, which has no meaning over `{name}`; use "
            "`actions: TokenActions`"
        )
    if objective.selection.of_whole and getattr(objective.support, "outside", "refuse") == "drop":
        raise UserError(
            f"`{type(objective.selection).__name__}` takes means over whole responses, of which "
            f"`{type(objective.support).__name__}.outside: drop` takes tokens away; use `unite`"
            + (", or `unbiased: false`" if objective.selection.weighted else "")
        )


def _check_whole(objective: Axes) -> None:
    """Refuse parts that take a response as a whole beside others that take its tokens apart."""
    by_token = objective.advantage.by_token or (
        objective.kl_in_reward and objective.advantage.to_go
    )
    if getattr(objective.actions, "form", None) == "sequence" and by_token:
        raise UserError(
            f"`SequenceActions` takes one advantage for a response, and `{type(objective.advantage).__name__}` gives its "
            "tokens different ones; use `SequenceActions.form: token`"
        )
    wide = getattr(objective.surrogate, "wide", None)
    if wide is not None and not isinstance(objective.selection, AllTokens):
        raise UserError(
            "`AsymmetricRatio.wide` is for the most uncertain tokens of whole responses; use `selection: AllTokens`, not "
            f"`{type(objective.selection).__name__}`, or `wide: null`"
        )


def _check_credit(objective: Axes) -> None:
    """Refuse what would take the tokens away that an advantage gives credit to."""
    actions, name = objective.actions, type(objective.actions).__name__
    estimator = type(objective.advantage).__name__
    if not actions.token_level:
        raise UserError(
            f"`{estimator}` gives credit to single tokens; use `actions: TokenActions`, not `{name}`"
        )
    if not isinstance(objective.selection, AllTokens):
        raise UserError(
            f"`{estimator}` chooses its tokens itself; use `selection: AllTokens`, not "
            f"`{type(objective.selection).__name__}`"
        )
    if getattr(objective.support, "outside", "refuse") == "drop":
        raise UserError(
            f"`{estimator}` would lose branches to `{type(objective.support).__name__}.outside: drop`; use `unite`"
        )
    if not isinstance(objective.reduction, TokenMean):
        raise UserError(
            f"`{estimator}` lets each branch count once, which `{type(objective.reduction).__name__}` would undo; use "
            "`reduction: TokenMean`"
        )
    if objective.advantage.whiten or (objective.kl is not None and objective.kl.place == "reward"):
        raise UserError(
            f"`{estimator}` compares rewards of responses; put the KL penalty into the loss"
        )


def _check_correction(objective: Axes) -> None:
    """Refuse a correction that counts twice, or that single tokens would need."""
    correction = objective.correction
    if correction is None:
        return
    if objective.surrogate.at_behaviour:
        raise UserError(
            f"`{type(objective.surrogate).__name__}` takes its ratios against the sampler's own log-probs, so that a "
            "`correction` would count the difference twice; set `correction: null`"
        )
    if correction.level == "token" and not objective.actions.token_level:
        raise UserError(
            f"`{type(correction).__name__}.level: token` has no meaning over `{type(objective.actions).__name__}`; use "
            "`level: sequence`"
        )
