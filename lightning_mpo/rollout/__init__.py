"""Sampling of responses."""

from lightning_mpo.rollout.base import Progress, Sampler
from lightning_mpo.rollout.local import LocalSampler

__all__ = ["LocalSampler", "Progress", "Sampler"]
