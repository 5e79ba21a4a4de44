"""Responses on which a policy and its reloaded export are compared."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_mpo.export.reloaded import copies_of, most_probable
from lightning_mpo.functional.noise import coupled_copies, stratified, whole_numbers
from lightning_mpo.objective.likelihoods import behind_prompt
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.sampling.base import Sampler, SamplingRequest
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptBatch, Rollout


def draw(
    policy: LoadedPolicy,
    prompts: PromptBatch,
    temperature: float,
    tokens: int,
    sampler: Sampler | None,
) -> tuple[Rollout, Rollout]:
    """Sample once per prompt, and once greedily.

    Args:
        policy: in rollout mode.
        prompts: prompts of the responses.
        temperature: of the sampling.
        tokens: longest response. A masked policy takes the whole blocks that fit, at least one.
        sampler: of the run; a masked policy takes its block and its tokens per step.

    Returns:
        samples, and greedy responses. Samples of a masked policy have noised copies. Greedy
        responses have the two most probable ids of each step as candidates.
    """
    masked = isinstance(policy, MaskedPolicy)
    if masked:
        sampler = _blocks(sampler, tokens)
        tokens = sampler.block * max(1, tokens // sampler.block)
    else:
        sampler = LocalSampler()
    request = SamplingRequest(FullVocabulary(), temperature, tokens)
    best = replace(request, greedy=True, candidates=0 if masked else 2)
    sampled, greedy = (
        sampler.sample(policy, prompts, 1, options, generator=generator_of(0, Stream.CHECK))
        for options in (request, best)
    )
    if isinstance(policy, MaskedPolicy):
        return with_copies(sampled), with_candidates(policy, greedy)
    return sampled, greedy


def _blocks(sampler: Sampler | None, tokens: int) -> DiffusionSampler:
    """Return a sampler with the blocks and steps of another, if it has any."""
    if isinstance(sampler, DiffusionSampler):
        return DiffusionSampler(sampler.block, sampler.tokens_per_step)
    return DiffusionSampler(tokens)


def with_copies(rollout: Rollout) -> Rollout:
    """Return canvases with two copies; each token is hidden in one of them, the same at each call."""
    draws, (B, T) = generator_of(1, Stream.CHECK), rollout.response_mask_BT.shape
    canvas_BT = torch.ones(B, T, dtype=torch.bool)
    size_B = whole_numbers(stratified(torch.rand((), generator=draws), B), 0, canvas_BT.sum(1))
    copies = coupled_copies(torch.rand(B, T, generator=draws), canvas_BT, size_B, 1)
    device = rollout.tokens_BL.device
    return replace(
        rollout,
        response_mask_BT=canvas_BT.to(device),
        hidden_BCL=behind_prompt(rollout, copies.hidden_BCT).to(device),
        copy_weights_BCT=copies.hidden_BCT.float().to(device),
    )


def with_candidates(policy: MaskedPolicy, rollout: Rollout) -> Rollout:
    """Return a rollout with the policy's two most probable ids of each step, and log-probs."""

    def logits(rollout: Rollout, b: int, hidden_CT: Tensor) -> Tensor:
        ids_CL, T = copies_of(policy, rollout, b, hidden_CT), hidden_CT.shape[1]
        states_CLD = policy.states(ids_CL, torch.ones_like(ids_CL, dtype=torch.bool))
        states_nD = states_CLD[:, -T:].flatten(0, 1)
        return policy.logits(states_nD).view(len(ids_CL), T, -1)

    rows = [most_probable(policy, rollout, b, logits) for b in range(len(rollout.group_B))]
    ids_BT2, logprobs_BT2 = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return replace(rollout, candidates_BTK=ids_BT2, candidate_logprobs_BTK=logprobs_BT2)
