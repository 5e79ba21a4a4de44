"""From prompts to responses: requests, samplers, the KV cache, and restarts within responses."""

from lightning_mpo.sampling.base import Progress, Sampler, SamplingRequest
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.sampling.replay import PrefixReplay

__all__ = [
    "DiffusionSampler",
    "LocalSampler",
    "PrefixReplay",
    "Progress",
    "Sampler",
    "SamplingRequest",
]
