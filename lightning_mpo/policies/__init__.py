"""Policies: distributions over responses, with their references, heads and critics."""

from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.lora import Lora
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.policies.mtp import MedusaHeads, MTPHeads, ParallelHeads, SequentialHeads
from lightning_mpo.policies.quantization import Quantization
from lightning_mpo.policies.tiny import TinyPolicy
from lightning_mpo.policies.tiny_masked import TinyMaskedPolicy
from lightning_mpo.policies.value import Critic, SeparateCritic, ValueHead

__all__ = [
    "CausalPolicy",
    "Critic",
    "Lora",
    "MTPHeads",
    "MaskedPolicy",
    "MedusaHeads",
    "ParallelHeads",
    "Policy",
    "Quantization",
    "SeparateCritic",
    "SequentialHeads",
    "TinyMaskedPolicy",
    "TinyPolicy",
    "ValueHead",
    "rollout_mode",
]
