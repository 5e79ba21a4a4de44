"""Sampling of responses."""

from lightning_mpo.rollout.base import Progress, Sampler, SamplingRequest
from lightning_mpo.rollout.dynamic import DynamicSampling
from lightning_mpo.rollout.joining import join_rollouts
from lightning_mpo.rollout.local import LocalSampler
from lightning_mpo.rollout.record import load_rollout, save_rollout
from lightning_mpo.rollout.replay import PrefixReplay

__all__ = [
    "DynamicSampling",
    "LocalSampler",
    "PrefixReplay",
    "Progress",
    "Sampler",
    "SamplingRequest",
    "join_rollouts",
    "load_rollout",
    "save_rollout",
]
