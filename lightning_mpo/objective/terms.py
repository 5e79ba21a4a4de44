"""Loss terms beside the surrogate that are a number and a formula: entropy bonus, weight penalty, upkeep of heads.

Equations and sources: docs/algorithms.md 11.2 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mpo.checks import finite, not_below, positive


@dataclass(frozen=True)
class EntropyBonus:
    """Subtracts `coef` times the policy's entropy from the loss.

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.0

    def __post_init__(self) -> None:
        finite("EntropyBonus", coef=self.coef)


@dataclass(frozen=True)
class WeightPenalty:
    """Adds `coef·Σ θ²` over the weights of the policy's adapters to the loss: the L2 term of T-SPMO.

    That the paper holds its adapters in place by an L2 term instead of a KL penalty is [REC], its size is not known
    [N] (docs/algorithms.md 12). Unlike AdamW's weight decay it goes through the optimizer's moments. Weights that are no adapter's
    are left alone: pulled towards 0 they would forget the model; a policy without adapters is told so once.

    Args:
        coef: factor, positive; 0.01 is ours [I].
    """

    coef: float = 0.01

    def __post_init__(self) -> None:
        positive("WeightPenalty", coef=self.coef, note="; `penalty: null` leaves it out")


@dataclass(frozen=True)
class HeadUpkeep:
    """Keeps multi-token heads on the drifting policy: cross-entropy on its own samples, trunk detached.

        coef · (1/M) · Σ_n mean_t -log q_n(o_{t+n} | h_t)            (the warm-up loss [S]; docs/algorithms.md 11.2)

    The mean is over all tokens of the loss; one without a target at offset n counts 0 there. Whether MPO trains its heads
    during reinforcement learning is not known [N]; small and detached is our choice [I].

    Args:
        coef: factor, per nat.
    """

    coef: float = 0.1

    def __post_init__(self) -> None:
        not_below("HeadUpkeep", 0, coef=self.coef)
