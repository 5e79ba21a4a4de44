"""Every family of multi-token heads, and a loop over rows that scores them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.policies import (
    CausalPolicy,
    MedusaHeads,
    MTPHeads,
    ParallelHeads,
    SequentialHeads,
)
from lightning_mpo.policies.trunk import record_norm_input
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import seeded

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
FAMILIES = [ParallelHeads, SequentialHeads, MedusaHeads]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
M = 3
REQUEST = ScoreRequest(future=M)


def scramble(heads: MTPHeads, size: float = 0.4) -> None:
    """Give every weight of the heads a value that matters."""
    generator = seeded(7)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(
                size
                * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(
                    weight.dtype
                )
            )


def naive(policy: CausalPolicy, rollout, *, temperature: float = 1.0) -> Tensor:
    """Score one row at a time with plain transformers: no padding, packing, chunks or masks of ours."""
    heads, decoder = policy.mtp, policy.decoder()
    S, (B, T) = rollout.prompt_length, rollout.response_mask_BT.shape
    future = torch.zeros(B, T, M, dtype=torch.float64)
    for b in range(B):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        response = rollout.responses_BT[b][rollout.response_mask_BT[b]]
        ids = torch.cat([prompt, response])[None]
        L, s = ids.shape[1], len(prompt)
        with record_norm_input(decoder) as before:
            after = decoder(input_ids=ids, use_cache=False).last_hidden_state
        positions = torch.arange(L)[None]
        causal = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]

        def layer(module, hidden, positions=positions, causal=causal):
            return module(
                hidden,
                attention_mask=causal,
                position_ids=positions,
                position_embeddings=decoder.rotary_emb(hidden, positions),
            )

        chain = after
        for n in range(1, M + 1):
            if heads.family == "parallel":
                hidden = decoder.norm(layer(heads.layers[n - 1], before[0]))
            elif heads.family == "medusa":
                hidden = after + torch.nn.functional.silu(after @ heads.residual[n - 1].weight.T)
            else:
                ahead = torch.zeros_like(ids)
                ahead[:, : L - n] = ids[:, n:]
                embedded = heads.enorm[n - 1](decoder.embed_tokens(ahead))
                pair = torch.cat([embedded, heads.hnorm[n - 1](chain)], -1)
                chain = layer(heads.layers[n - 1], heads.eh_proj[n - 1](pair))
                hidden = heads.norm[n - 1](chain)
            table = (hidden[0] @ heads.unembedding(n).weight.T / temperature).log_softmax(-1)
            for t in range(len(response) - n):
                future[b, t, n - 1] = table[s - 1 + t, response[t + n]]
    return future


def _with(rollout, b, t, token):
    from dataclasses import replace

    tokens = rollout.tokens_BL.clone()
    tokens[b, rollout.prompt_length + t] = token
    return replace(rollout, tokens_BL=tokens)
