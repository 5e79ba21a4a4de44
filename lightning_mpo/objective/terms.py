"""Loss terms beside the surrogate: the interface, and terms that are a coefficient and a line of
arithmetic.

Equations and sources: docs/algorithms.md 11.2 and 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mpo.checks import finite, not_below, positive
from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.scores import Metrics, ScoreRequest, TokenScores
from lightning_mpo.types import Experience


@dataclass(frozen=True)
class LossBatch:
    """A micro-batch as a loss term sees it.

    Args:
        experience: the rows.
        scores: of the current policy, with gradient.
        weights_BT: of tokens in the loss, 0: left out.
        mean: turns values `[B, T]` into this micro-batch's part of their mean, by the reduction of
            the objective.
    """

    experience: Experience
    scores: TokenScores
    weights_BT: Tensor
    mean: Callable[[Tensor], Tensor]


class LossTerm(Member):
    """A term of the loss beside the surrogate: a frozen dataclass that overrides `loss`, and more
    where needed.
    """

    needs_reference = False
    """True if the frozen reference must score each rollout."""

    @property
    def request(self) -> ScoreRequest:
        """Scores that the term needs from the policy, besides log-probs and entropies."""
        return ScoreRequest()

    @property
    def in_reward(self) -> bool:
        """Whether the term changes the rewards of tokens, instead of the loss."""
        return False

    @property
    def learns_alone(self) -> bool:
        """Whether the term has a gradient although all advantages are 0; such updates then go
        on.
        """
        return True

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        """Return a micro-batch's part of the loss, and metrics; None: the term adds nothing."""
        return None

    def weights_loss(self, policy: nn.Module) -> tuple[Tensor, Metrics] | None:
        """Return a loss of the policy's weights, which each update holds once, and metrics; None:
        none.
        """
        return None

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """Return an update's metrics, completed by those that are no means over tokens."""
        return means

    def remark(self, policy: nn.Module) -> str | None:
        """Return a warning about a policy on which the term has no effect, or None."""
        return None


@dataclass(frozen=True)
class EntropyBonus(LossTerm):
    """Subtracts `coef` times the policy's entropy from the loss.

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.0

    def __post_init__(self) -> None:
        finite("EntropyBonus", coef=self.coef)

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(entropy_grad=self.coef != 0)

    @property
    def learns_alone(self) -> bool:
        return self.coef != 0

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        return (-self.coef * batch.mean(batch.scores.entropy_BT), {}) if self.coef else None


@dataclass(frozen=True)
class WeightPenalty(LossTerm):
    """Adds `coef·Σ θ²` over the weights of the policy's adapters to the loss: the L2 term of
    T-SPMO.

    That the paper holds its adapters in place by an L2 term instead of a KL penalty is [REC], its
    size is not known [N] (docs/algorithms.md 12). Unlike AdamW's weight decay it goes through the
    optimizer's moments. Other weights are left alone: pulled towards 0 they would forget the model.
    A policy without adapters causes one warning.

    Args:
        coef: factor, positive; 0.01 is ours [I].
    """

    coef: float = 0.01

    def __post_init__(self) -> None:
        positive("WeightPenalty", coef=self.coef, note="; leave it out of `terms` instead")

    def weights_loss(self, policy: nn.Module) -> tuple[Tensor, Metrics]:
        weights = _adapters(policy)
        zero = torch.zeros((), device=weights[0].device if weights else None)
        squares = sum((weight.float().square().sum() for weight in weights), zero)
        return self.coef * squares, {"optim/adapter_square": (squares, torch.ones(()))}

    def remark(self, policy: nn.Module) -> str | None:
        if _adapters(policy):
            return None
        return "`WeightPenalty` holds adapters small and the policy has none; give `policy.lora`"


def _adapters(policy: nn.Module) -> list[nn.Parameter]:
    parameters = policy.named_parameters()
    return [weight for name, weight in parameters if weight.requires_grad and "lora_" in name]


@dataclass(frozen=True)
class HeadUpkeep(LossTerm):
    """Keeps multi-token heads on the drifting policy: cross-entropy on its own samples, trunk
    detached.

        coef · (1/M) · Σ_n mean_t -log q_n(o_{t+n} | h_t)
                                                     (the warm-up loss [S]; docs/algorithms.md 11.2)

    The mean is over all tokens of the loss; one without a target at offset n counts 0 there.
    Whether MPO trains its heads during reinforcement learning is not known [N]; small and detached
    is our choice [I].

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.1

    def __post_init__(self) -> None:
        not_below("HeadUpkeep", 0, coef=self.coef)

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(upkeep=self.coef != 0)

    @property
    def learns_alone(self) -> bool:
        return self.coef != 0

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        heads_BTM = batch.scores.upkeep_BTM
        return None if heads_BTM is None else (-self.coef * batch.mean(heads_BTM.mean(-1)), {})

    def check_with(self, axes: Axes) -> None:
        if not axes[ActionSpace].future:
            raise UserError(
                f"`HeadUpkeep` trains multi-token heads, but `{type(axes[ActionSpace]).__name__}` "
                "uses none; take it out of "
                "`objective.terms`, or set `source: mtp` in `BlockActions`"
            )
