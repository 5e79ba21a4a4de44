"""The axes of an algorithm, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.advantages import Advantage
from lightning_mpo.objective.corrections import Correction
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.reductions import Reduction
from lightning_mpo.objective.selection import Selection
from lightning_mpo.objective.supports import Support
from lightning_mpo.objective.surrogates import Surrogate
from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep, WeightPenalty
from lightning_mpo.objective.value_loss import ValueLoss


@dataclass(frozen=True)
class Axes:
    """A choice on each axis. `Objective` composes them, and its docstring explains each field."""

    support: Support
    actions: ActionSpace
    advantage: Advantage
    surrogate: Surrogate
    selection: Selection
    reduction: Reduction
    correction: Correction | None = None
    bonus: EntropyBonus | None = None
    penalty: WeightPenalty | None = None
    kl: KLPenalty | None = None
    upkeep: HeadUpkeep | None = None
    critic: ValueLoss | None = None

    @property
    def needs_entropy(self) -> bool:
        """Whether an axis uses entropies at rollout weights."""
        return (
            self.actions.needs_entropy
            or self.selection.needs_entropy
            or self.surrogate.needs_entropy
        )

    @property
    def needs_behaviour(self) -> bool:
        """Whether the loss uses the sampler's log-probs; otherwise only the parity gate compares them."""
        return self.surrogate.at_behaviour or self.correction is not None

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the loss."""
        return self.kl is not None and self.kl.place == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL penalty is subtracted from the rewards."""
        return self.kl is not None and self.kl.place == "reward"
