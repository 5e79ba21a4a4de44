"""The surrogate of BGPO, a lower bound that is linear in the samples of a likelihood."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_mpo.checks import positive
from lightning_mpo.functional.linear_bound import linear_bound
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.surrogates import Surrogate


@dataclass(frozen=True)
class LinearBound(Surrogate):
    """`-(1 + log R)·A` for positive advantages, `-R·A` for negative ones (BGPO).

    Each noised sample of an `Elbo` is a row with a bound of its own. The surrogate has no trust
    region. All action spaces and likelihoods are allowed: at the old policy its gradient is the
    policy gradient [I]. docs/algorithms.md 5.8; arXiv:2510.11683 [P].

    Args:
        limit: largest log-ratio in the exponential, above 0 and at most 80, nats. The paper has no
            limit [P]. Without division by the length, a log-ratio can be tens of nats after several
            updates [I].
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        positive("LinearBound", most=80, limit=self.limit)

    def loss(self, actions: Actions) -> Tensor:
        return linear_bound(actions.log_ratios_BU, actions.advantages_BU, limit=self.limit)
