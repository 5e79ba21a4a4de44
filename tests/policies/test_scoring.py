"""What hidden states say of response tokens: the parts that `test_causal.py` does not reach."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.scoring import ResponseTokens
from lightning_mpo.policies.unembedding import Unembedding
from tests.support.builders import VOCABULARY, make_rollout, seeded

D = 6


def scene(**options) -> tuple[ResponseTokens, torch.Tensor, nn.Linear]:
    """Response tokens of a small rollout, hidden states for every place of it, and an unembedding in float64."""
    rollout = make_rollout([4, 3], [5, 2, 4, 1], **options)
    B, L = rollout.tokens_BL.shape
    index_BT = (
        torch.arange(B)[:, None] * L
        + rollout.prompt_length
        - 1
        + torch.arange(rollout.responses_BT.shape[1])
    )
    tokens = ResponseTokens.of(rollout, rollout.response_mask_BT, index_BT)
    head = nn.Linear(D, VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=seeded(2), dtype=torch.float64))
    return tokens, torch.randn(B, L, D, generator=seeded(1), dtype=torch.float64), head


@pytest.mark.parametrize("slots", [False, True])
def test_logits_of_the_support_are_those_of_the_head(slots):
    tokens, hidden, head = scene(support=5, slots=slots)
    hidden.requires_grad_()
    half = Unembedding.of(head, temperature=0.5)
    plain = tokens.logprobs(hidden, half)
    logprobs, entropies, logits, _ = tokens.logprobs(hidden, half, logits=True)
    assert plain[2] is None
    assert torch.equal(plain[0], logprobs)
    assert torch.equal(plain[1], entropies)
    counts = tokens.mask_BT[..., None].expand_as(logits)
    if slots:
        assert not tokens.support_mask_BTK[tokens.mask_BT].all()
        counts = counts & tokens.support_mask_BTK
    table = head(hidden.flatten(0, 1)[tokens.index_BT]) / 0.5
    expected = torch.where(counts, table.gather(2, tokens.support_BTK.long()), 0)
    torch.testing.assert_close(logits, expected)
    (gradient,) = torch.autograd.grad(logits.square().sum(), hidden, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), hidden)[0])


def test_logits_need_a_stored_support():
    tokens, hidden, head = scene()
    assert tokens.logprobs(hidden, Unembedding.of(head))[2] is None
    with pytest.raises(
        UserError, match="logits of the support need a stored one: give `support` as `TopK`"
    ):
        tokens.logprobs(hidden, Unembedding.of(head), logits=True)


def test_top_k_is_that_of_the_full_head():
    tokens, hidden, head = scene(support=5)
    ids = tokens.top_k(hidden, Unembedding.of(head), 4)
    table = head(hidden.flatten(0, 1)[tokens.index_BT])
    assert torch.equal(ids.long(), table.topk(4).indices * tokens.mask_BT[..., None])
