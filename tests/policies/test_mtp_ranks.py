"""Ranks of multi-token heads, their memory, and responses that end with any token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mpo.functional.actions import window
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import END, VOCABULARY, make_rollout
from tests.support.mtp import PROMPTS, REQUEST, RESPONSES, M, _with, naive


def test_ranks_count_what_is_more_probable(policy_with_heads):
    policy = policy_with_heads()
    rollout = make_rollout([4, 2], [5, 3])
    mask = rollout.response_mask_BT
    ranks = policy.ranks(rollout, mask, M)
    assert ranks.shape == (*mask.shape, M + 1)
    best = naive_best(policy, rollout)
    for n in range(M + 1):
        alive = window(mask, n)
        assert torch.equal((ranks[..., n] == 0)[alive], best[..., n][alive])
        assert not ranks[..., n][~alive].any()


def naive_best(policy, rollout):
    """Tell where the true token is the most probable one, by trying every other token in its place."""
    mask = rollout.response_mask_BT
    best = torch.zeros(*mask.shape, M + 1, dtype=torch.bool)
    tables = []
    for token in range(VOCABULARY):
        tables.append(_forced(policy, rollout, token))
    tables = torch.stack(tables, -1)  # [B, T, 1 + M, V]
    for n in range(M + 1):
        for b, t in window(mask, n).nonzero().tolist():
            best[b, t, n] = tables[b, t, n].argmax() == rollout.responses_BT[b, t + n]
    return best


def _forced(policy, rollout, token):
    """Log-prob of one token at every offset; parallel heads do not read what they predict."""
    B, T = rollout.response_mask_BT.shape
    values = torch.full((B, T, M + 1), -torch.inf, dtype=torch.float64)
    for n in range(M + 1):
        for b, t in window(rollout.response_mask_BT, n).nonzero().tolist():
            swapped = _with(rollout, b, t + n, token)
            scores = policy.score(
                swapped, swapped.response_mask_BT, temperature=1.0, request=REQUEST
            )
            values[b, t, n] = (scores.logprobs_BT if n == 0 else scores.future_BTM[..., n - 1])[
                b, t
            ].detach()
    return values


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_no_tensor_grows_with_offsets_times_vocabulary(monkeypatch, policy_with_heads):
    from lightning_mpo.functional import heads as functional

    monkeypatch.setattr(functional, "FULL_CHUNK_BYTES", 4 * VOCABULARY * 2)
    rollout = make_rollout(PROMPTS, RESPONSES)
    sizes = []
    for offsets in (1, 3):
        policy = policy_with_heads(offsets=3)
        with Largest() as largest:
            scores = policy.score(
                rollout,
                rollout.response_mask_BT,
                temperature=1.0,
                request=ScoreRequest(future=offsets),
            )
            scores.future_BTM.sum().backward()
        sizes.append(largest.size)
    assert sizes[0] == sizes[1]


def test_a_response_may_end_with_any_token(policy_with_heads):
    """Masks are carried: an end token inside a response is a token like others."""
    policy = policy_with_heads()
    rollout = make_rollout([4], [5])
    rollout.tokens_BL[0, 6] = END
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    torch.testing.assert_close(future.double(), naive(policy, rollout), rtol=1e-9, atol=1e-9)
