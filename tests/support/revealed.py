"""Samples of the diffusion sampler, and a loop over single rows that defines the right answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.types import NEVER, Rollout
from tests.support.builders import make_prompts, seeded

PROMPTS, G, T, BLOCK = [4, 7, 1, 5], 3, 12, 4


def reveal(policy, *, prompts=None, completions=G, seed=0, progress=None, **options) -> Rollout:
    """Sample with options of the sampler and of the request."""
    names = ("block", "tokens_per_step", "remasking", "batch_size")
    sampler = {name: options.pop(name) for name in names if name in options}
    request = {"support": FullVocabulary(), "temperature": 1.0, "max_new_tokens": T} | options
    return DiffusionSampler(**{"block": BLOCK} | sampler).sample(
        policy,
        make_prompts(PROMPTS) if prompts is None else prompts,
        completions,
        SamplingRequest(**request),
        generator=seeded(seed),
        progress=progress,
    )


@dataclass
class Row:
    """A canvas that was revealed by itself."""

    tokens: list[int]
    reveal: list[int]
    logprobs: list[float] = field(default_factory=lambda: [0.0] * T)
    entropies: list[float] = field(default_factory=lambda: [0.0] * T)
    supports: list[list[int]] = field(default_factory=lambda: [[] for _ in range(T)])
    masses: list[float] = field(default_factory=lambda: [1.0] * T)


def state_before(policy, prompt: Tensor, tokens: Tensor, hidden: Tensor, t: int) -> Tensor:
    """Return the logits at position t of one row, from a pass over it without padding."""
    ids = torch.cat([prompt, tokens.masked_fill(hidden, policy.mask_id)])[None]
    with torch.no_grad():
        states = policy.states(ids, torch.ones_like(ids, dtype=torch.bool))
        return policy.logits(states[:, len(prompt) + t])[0].double()


def distribution(logits: Tensor, support: Support, temperature: float) -> tuple[list[int], Tensor]:
    """Return the ids of a support and their probabilities, most probable first."""
    scaled = logits / temperature
    ids, slots = support.select(scaled[None].float())
    if ids is None:
        order = list(range(len(logits)))
    else:
        kept = ids[0] if slots is None else ids[0][slots[0]]
        order = kept.tolist()
    return order, scaled[order].softmax(0)


def naive_row(policy, prompt: Tensor, uniform: Tensor, order: Tensor | None, options: dict) -> Row:
    """Reveal one row in float64 and plain loops.

    Args:
        policy: a masked policy.
        prompt: ids without padding.
        uniform: numbers by step and position in the block.
        order: those of random remasking.
        options: of the sampler and the request.
    """
    support, temperature = options["support"], options["temperature"]
    count, block = options["tokens_per_step"], options["block"]
    row = Row([policy.end_tokens[0]] * T, [NEVER] * T)
    tokens, hidden = torch.tensor(row.tokens), torch.ones(T, dtype=torch.bool)
    for start in range(0, T, block):
        for s in range(start // count, (start + block) // count):
            drawn = []
            for t in range(start, start + block):
                if not hidden[t]:
                    continue
                logits = state_before(policy, prompt, tokens, hidden, t)
                ids, shares = distribution(logits, support, temperature)
                u, total, place = float(uniform[s, t - start]), 0.0, int(shares.argmax())
                for k in range(0 if not options["greedy"] else len(ids), len(ids)):
                    total += float(shares[k])
                    if total > u:
                        place = k
                        break
                entropy = -sum(p * torch.tensor(p).log().item() for p in shares.tolist() if p > 0)
                score = {
                    "low_confidence": float(logits.softmax(0)[ids[place]]),
                    "entropy": -entropy,
                    "random": 0.0 if order is None else float(order[s, t - start]),
                }[options["remasking"]]
                mass = float((logits / temperature).softmax(0)[ids].sum())
                drawn.append(
                    (-score, t, ids[place], float(shares[place].log()), entropy, ids, mass)
                )
            for _, t, token, logprob, entropy, ids, mass in sorted(drawn, key=lambda d: d[:2])[
                :count
            ]:
                tokens[t], hidden[t], row.tokens[t], row.reveal[t] = token, False, token, s
                row.logprobs[t], row.entropies[t], row.masses[t] = logprob, entropy, mass
                row.supports[t] = ids
        if all(token in policy.end_tokens for token in row.tokens[start : start + block]):
            break
    return row
