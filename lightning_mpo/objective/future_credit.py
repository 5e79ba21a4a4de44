"""Which advantage the later tokens of a block have, in `BlockActions` (docs/algorithms.md 3.7)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mpo.checks import one_of
from lightning_mpo.errors import UserError
from lightning_mpo.functional import advantages as A
from lightning_mpo.functional import future_credit as F
from lightning_mpo.functional.actions import shift_left
from lightning_mpo.objective.axes import Member
from lightning_mpo.objective.outcome import Outcome

Negatives = Literal["keep", "drop", "bound"]


class FutureCredit(Member):
    """The advantage of offsets n ≥ 1 of a block; the first token keeps that of the objective.

    A subclass has the field `negatives`: what becomes of negative advantages of later tokens.
    "keep" takes them as they are; "drop" sets them to 0; "bound" multiplies them by
    `min(1, q_n_old / π_old)` of the token, so that a push down ends with the head's probability
    [I].
    """

    negatives = "keep"
    compares_group = False
    """True where a response is compared with the others of its prompt."""

    def __post_init__(self) -> None:
        one_of(type(self).__name__, get_args(Negatives), negatives=self.negatives)

    @abstractmethod
    def advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor:
        """Return the advantage that the later tokens of the block at t have, `[B, T]`.

        Args:
            outcome: the judged responses.
            advantages_BT: of the objective, whitened if it whitens.
        """

    def by_offset(
        self,
        future_advantages_BT: Tensor,
        old_future_BTM: Tensor,
        old_logprobs_BT: Tensor,
    ) -> Tensor:
        """Return the advantages of offsets 1 … M, `[B, T, M]`.

        Args:
            future_advantages_BT: what `advantages` returned.
            old_future_BTM: of the heads at rollout weights, nats.
            old_logprobs_BT: of the policy at rollout weights, nats.
        """
        offsets = old_future_BTM.shape[-1]
        advantages_BTM = future_advantages_BT[..., None].expand(-1, -1, offsets)
        if self.negatives == "drop":
            return advantages_BTM.clamp(min=0)
        if self.negatives == "keep":
            return advantages_BTM
        policy_BTM = torch.stack(
            [shift_left(old_logprobs_BT, n) for n in range(1, offsets + 1)], -1
        )
        return F.bound_negatives(advantages_BTM, old_future_BTM, policy_BTM)

    def check(self, group_size: int) -> None:
        """Refuse a group in which there is nothing to compare."""
        if self.compares_group and group_size < 2:
            raise UserError(
                f"`{type(self).__name__}` compares the completions of a prompt; "
                f"`rollout.completions` must be at least 2, got {group_size}"
            )


@dataclass(frozen=True)
class SameCredit(FutureCredit):
    """The advantage of the block's first token: the paper's letter [S].

    Args:
        negatives: of later tokens: "keep", "drop" or "bound".
    """

    negatives: Negatives = "keep"

    def advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor:
        return advantages_BT


@dataclass(frozen=True)
class OutcomeCredit(FutureCredit):
    """The response's reward against its group, as in GRPO: mean 0 at each prompt [I].

    Args:
        negatives: of later tokens: "keep", "drop" or "bound".
    """

    negatives: Negatives = "keep"

    compares_group = True

    def advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor:
        values_B = A.group_relative(
            outcome.rewards_B, outcome.group_size, scale="std", valid_B=outcome.valid_B
        )
        return outcome.spread(values_B).to(advantages_BT)


@dataclass(frozen=True)
class CentredCredit(FutureCredit):
    """The objective's advantage less its mean over the group at the same position [I].

    Args:
        negatives: of later tokens: "keep", "drop" or "bound".
    """

    negatives: Negatives = "keep"

    compares_group = True

    def advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor:
        return F.centred_advantages(
            advantages_BT, outcome.mask_BT, outcome.group_size, valid_B=outcome.valid_B
        )


@dataclass(frozen=True)
class StateCredit(FutureCredit):
    """The reward less the mean reward of the group's completions that share the tokens before t.

    Its mean is 0 at each state that completions share [I].

    Args:
        negatives: of later tokens: "keep", "drop" or "bound".
    """

    negatives: Negatives = "keep"

    compares_group = True

    def advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor:
        if outcome.tokens_BT is None:
            raise RuntimeError("`StateCredit` needs the tokens of the responses")
        return F.prefix_advantages(
            outcome.tokens_BT,
            outcome.mask_BT,
            outcome.rewards_B,
            outcome.group_size,
            valid_B=outcome.valid_B,
        ).to(advantages_BT)
