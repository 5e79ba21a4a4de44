"""Policies: what assigns likelihood to responses."""

from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.policies.causal import CausalPolicy, Lora
from lightning_mpo.policies.tiny import TinyPolicy

__all__ = ["CausalPolicy", "Lora", "Policy", "TinyPolicy", "rollout_mode"]
