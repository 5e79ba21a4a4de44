"""Sampling of responses."""

from lightning_mpo.rollout.base import Progress, Sampler
from lightning_mpo.rollout.local import LocalSampler
from lightning_mpo.rollout.record import load_rollout, save_rollout

__all__ = ["LocalSampler", "Progress", "Sampler", "load_rollout", "save_rollout"]
