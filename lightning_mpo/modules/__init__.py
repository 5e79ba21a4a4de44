"""LightningModules: the reinforcement stage and the supervised stage before it."""

from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.warmup import SupervisedWarmup

__all__ = ["PolicyOptimization", "SupervisedWarmup"]
