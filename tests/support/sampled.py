"""Samples of the local sampler, and plain forward passes to compare them with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.types import PromptBatch, Rollout
from tests.support.builders import VOCABULARY, make_prompts, seeded

PROMPTS, G, T = [4, 7, 1, 5], 6, 12
SUPPORTS = [FullVocabulary(), TopK(5), TopK(1), TopK(VOCABULARY)]
each_support = pytest.mark.parametrize("support", SUPPORTS, ids=["full", "top5", "top1", "topV"])


def sample(policy, prompts: PromptBatch | None = None, completions: int = G, **options) -> Rollout:
    of_sampler = {
        name: options.pop(name) for name in ("batch_size", "ignore_end_tokens") if name in options
    }
    generator, progress = options.pop("generator", seeded(0)), options.pop("progress", None)
    request = SamplingRequest(
        **{"support": FullVocabulary(), "temperature": 1.0, "max_new_tokens": T} | options
    )
    prompts = make_prompts(PROMPTS) if prompts is None else prompts
    return LocalSampler(**of_sampler).sample(
        policy, prompts, completions, request, generator=generator, progress=progress
    )


def next_logits(policy, tokens: list[int]) -> Tensor:
    """Return the logits behind a text, from a plain forward pass without cache or padding."""
    with torch.no_grad():
        return policy.network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def responses(rollout: Rollout) -> list[list[int]]:
    return [
        row[mask].tolist()
        for row, mask in zip(rollout.responses_BT, rollout.response_mask_BT, strict=True)
    ]


class Ragged(Support):
    """Keeps two to four of the five best tokens: a support with slots that hold nothing."""

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        best = logits_BV.topk(5)
        size = 2 + (best.indices[:, :1] % 3)
        return best.indices.int(), torch.arange(5) < size
