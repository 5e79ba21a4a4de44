"""LightningModules: the reinforcement stage, and the supervised stages before it."""

from lightning_mpo.modules.head_warmup import HeadWarmup
from lightning_mpo.modules.masked_tokens import MaskedTokens
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.warmup import SupervisedWarmup
from lightning_mpo.quiet import leave_tips_out

__all__ = ["HeadWarmup", "MaskedTokens", "PolicyOptimization", "SupervisedWarmup"]

leave_tips_out()
