"""LightningModules: the reinforcement stage, and the supervised stages before it."""

from lightning_mpo.modules.head_warmup import HeadWarmup
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.warmup import SupervisedWarmup
from lightning_mpo.quiet import leave_tips_out

__all__ = ["HeadWarmup", "PolicyOptimization", "SupervisedWarmup"]

leave_tips_out()
