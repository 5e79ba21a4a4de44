"""The loss: one class for each choice (axis), and `Objective`, which puts them together."""

from lightning_mpo.objective.objective import Objective

__all__ = ["Objective"]
