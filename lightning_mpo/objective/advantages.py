"""Axis "advantage": how much better an action was than what it is compared with (docs/algorithms.md
4).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_mpo.checks import at_least, one_of, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import advantages as F
from lightning_mpo.functional.prefix_tree import prefix_tree
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.outcome import Estimate, Outcome
from lightning_mpo.objective.reductions import Reduction, TokenMean
from lightning_mpo.objective.selection import AllTokens, Selection
from lightning_mpo.objective.supports import Support
from lightning_mpo.objective.terms import LossTerm

LONGEST_ACTION = 4096
"""Largest number of tokens of an action; the time of an estimate grows with this number."""


class Advantage(Member):
    """Turns rewards into advantages."""

    compares_group = False
    """True where a response is compared with the others of its prompt, so that one completion has
    no advantage.
    """

    needs_values = False
    """True where a critic's values are the baseline."""

    weighs_tokens = False
    """True where the estimate says how much single tokens weigh."""

    to_go = False
    """True where a token's advantage is made of the rewards behind it, so that rewards of tokens
    tell them apart.
    """

    @property
    def by_token(self) -> bool:
        """Whether the tokens of a response get different advantages."""
        return False

    @property
    def whiten(self) -> bool:
        """Whether the advantages of a rollout, over all ranks, are given mean 0 and standard
        deviation 1 afterwards.
        """
        return False

    @abstractmethod
    def estimate(self, outcome: Outcome) -> Estimate:
        """Return advantages per token; rows that are not valid get 0."""

    def check(self, group_size: int) -> None:
        """Refuse a group in which there is nothing to compare."""
        if self.compares_group and group_size < 2:
            raise UserError(
                f"`{type(self).__name__}` compares the completions of a prompt; "
                "`rollout.completions` must be at "
                f"least 2, got {group_size}"
            )

    def check_with(self, axes: Axes) -> None:
        terms, actions = axes.all(LossTerm), axes[ActionSpace]
        if self.needs_values and not any(term.request.values for term in terms):
            raise UserError(
                f"`{type(self).__name__}` takes a critic's values; add `ValueLoss` to "
                "`objective.terms`"
            )
        if self.weighs_tokens:
            self._check_credit(axes)
        by_token = self.by_token or (self.to_go and any(term.in_reward for term in terms))
        if actions.one_per_response and by_token:
            raise UserError(
                f"`{type(actions).__name__}` takes one advantage for a response, and "
                f"`{type(self).__name__}` gives its "
                "tokens different ones; use `SequenceActions.form: token`"
            )

    def _check_credit(self, axes: Axes) -> None:
        """Refuse members that would take away the tokens to which this advantage gives credit."""
        name, actions, selection = type(self).__name__, axes[ActionSpace], axes[Selection]
        support, reduction = axes[Support], axes[Reduction]
        # members that join or leave out tokens
        if not actions.token_level:
            raise UserError(
                f"`{name}` gives credit to single tokens; use `actions: TokenActions`, not "
                f"`{type(actions).__name__}`"
            )
        if not isinstance(selection, AllTokens):
            raise UserError(
                f"`{name}` chooses its tokens itself; use `selection: AllTokens`, not "
                f"`{type(selection).__name__}`"
            )
        if support.outside == "drop":
            raise UserError(
                f"`{name}` would lose branches to `{type(support).__name__}.outside: drop`; use "
                "`unite`"
            )
        # members that weigh tokens or change their rewards
        if not isinstance(reduction, TokenMean):
            raise UserError(
                f"`{name}` lets each branch count once, which `{type(reduction).__name__}` would "
                "undo; use "
                "`reduction: TokenMean`"
            )
        if self.whiten or any(term.in_reward for term in axes.all(LossTerm)):
            raise UserError(
                f"`{name}` compares rewards of responses; put the KL penalty into the loss"
            )


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """`(R - mean) / (std + 1e-4)` within the group (GRPO), or `R - mean` (Dr. GRPO).

    Args:
        scale: "std" divides by the group's standard deviation (Bessel-corrected, TRL's form [C]);
            "none" does not; "batch" whitens over all response tokens of the rollout and all ranks
            instead (REINFORCE++ with a baseline [C, verl and OpenRLHF]; docs/algorithms.md 4.1).
    """

    compares_group = True

    scale: Literal["std", "none", "batch"] = "std"

    def __post_init__(self) -> None:
        one_of("GroupRelative", ("std", "none", "batch"), scale=self.scale)

    @property
    def whiten(self) -> bool:
        """Whether the module whitens afterwards."""
        return self.scale == "batch"

    def estimate(self, outcome: Outcome) -> Estimate:
        scale: Literal["std", "none"] = "std" if self.scale == "std" else "none"
        advantages_B = F.group_relative(
            outcome.rewards_B, outcome.group_size, scale=scale, valid_B=outcome.valid_B
        )
        return Estimate(outcome.spread(advantages_B))


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """`R_i - mean of the others` (RLOO; docs/algorithms.md 4.2)."""

    compares_group = True

    def estimate(self, outcome: Outcome) -> Estimate:
        advantages_B = F.leave_one_out(
            outcome.rewards_B, outcome.group_size, valid_B=outcome.valid_B
        )
        return Estimate(outcome.spread(advantages_B))


@dataclass(frozen=True)
class ReturnToGo(Advantage):
    """The discounted return from a token on, without a baseline: REINFORCE, and whitened
    REINFORCE++.

        A_t = Σ_{k>=t} γ^(k-t) r_k   ([C, verl and OpenRLHF]; docs/algorithms.md 4.3)

    One completion per prompt is enough.

    Args:
        gamma: γ, discount per token, in [0, 1].
        whiten: give the advantages of all response tokens of a rollout, over all ranks, mean 0 and
            standard deviation 1: the mean of the batch is the baseline then.
    """

    to_go = True

    gamma: float = 1.0
    whiten: bool = True

    def __post_init__(self) -> None:
        within("ReturnToGo", "[0, 1]", gamma=self.gamma)

    @property
    def by_token(self) -> bool:
        """Whether the discount tells the tokens apart."""
        return self.gamma != 1

    def estimate(self, outcome: Outcome) -> Estimate:
        zeros_BT = torch.zeros_like(outcome.rewards_BT)
        advantages_BT, _ = F.generalized_advantages(
            outcome.rewards_BT, zeros_BT, outcome.valid_BT, gamma=self.gamma, lam=1.0
        )
        return Estimate(advantages_BT)


@dataclass(frozen=True)
class GeneralizedAdvantage(Advantage):
    """Generalised advantage estimation from a critic's values (PPO); one completion per prompt is
    enough.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   return_t = A_t + V_t
                                                                (GAE Eq. 16; docs/algorithms.md 4.4)

    With `length` N an action is a block of N tokens. δ_t then has the rewards of the block and the
    value behind the block, and λ counts blocks [I]. The place of a reward within the block does
    not change the advantage of the block's first token, if `gamma` is 1.

    Rows that are not valid get advantage 0 and are their own returns. Returns are those of the raw
    advantages.

    Args:
        gamma: γ, discount per token, in [0, 1]. 1: a reward at the end counts in full at every
            token (TRL, verl [C]).
        lam: λ, in [0, 1]: 1 takes the whole return, 0 one step. TRL takes 0.95, verl and OpenRLHF 1
            [C].
        whiten: give the advantages of all response tokens of a rollout, over all ranks, mean 0 and
            standard deviation 1 (TRL, verl [C]), so that the step does not depend on the scale of
            the reward.
        length: N, number of tokens of an action. PPO has 1; with `BlockActions` its `length` [I].
    """

    needs_values = True
    by_token = True
    to_go = True

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    length: int = 1

    def __post_init__(self) -> None:
        within("GeneralizedAdvantage", "[0, 1]", gamma=self.gamma, lam=self.lam)
        at_least("GeneralizedAdvantage", 1, most=LONGEST_ACTION, length=self.length)

    def estimate(self, outcome: Outcome) -> Estimate:
        values_BT, valid_BT = outcome.values_BT, outcome.valid_BT
        if values_BT is None:
            raise RuntimeError("`GeneralizedAdvantage` needs the values of a critic")
        advantages_BT, returns_BT = F.generalized_advantages(
            outcome.rewards_BT,
            values_BT,
            valid_BT,
            gamma=self.gamma,
            lam=self.lam,
            length=self.length,
        )
        return Estimate(advantages_BT, torch.where(valid_BT, returns_BT, values_BT))


@dataclass(frozen=True)
class PrefixTree(Advantage):
    """Credit for the tokens at which the completions of a prompt part, and for no others (T-SPMO).

        A(v | p) = V(pv) - V(p),   V(p) = mean reward of the completions that start with prefix p

    Each distinct pair (p, v) counts once, at a branching prefix only; `TokenMean` divides by their
    number |U| in the mini-batch, so that a prompt with many branches weighs more than one with few.
    Dividing by the |U| of each prompt would be another reading [I]. arXiv:2504.20834: matching of
    prefixes in a trie, critic-free token credit, under 5 % of the tokens [S]; the formula and the
    choices are [REC, I] (docs/algorithms.md 4.6). Rows without a valid reward stand outside of the
    tree.

    Args:
        count: True: a pair counts once per completion that goes through it.
    """

    compares_group = True
    weighs_tokens = True
    by_token = True

    count: bool = False

    def estimate(self, outcome: Outcome) -> Estimate:
        if outcome.tokens_BT is None:
            raise RuntimeError("`PrefixTree` needs the tokens of the responses")
        advantages_BT, weights_BT = prefix_tree(
            outcome.tokens_BT,
            outcome.mask_BT,
            outcome.rewards_B,
            outcome.group_size,
            valid_B=outcome.valid_B,
        )
        if self.count:
            weights_BT = (weights_BT > 0).to(weights_BT)
        return Estimate(advantages_BT, weights_BT=weights_BT)
