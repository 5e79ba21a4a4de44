"""A low-rank adapter on the head is a changed weight, and makes no second matrix."""

import pytest
import torch

from lightning_mpo.functional.low_rank import LowRank
from tests.support.head_options import (
    full_logprobs,
    full_ranks,
    full_top_k,
    support_logits,
    support_logprobs,
)
from tests.support.heads import FORMS, low_rank, problem


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]])
@pytest.mark.parametrize("trained", ["hidden", "down up", "hidden weight bias down up", "weight"])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_an_adapter_is_a_changed_weight_in_values_and_gradients(form, trained, chunk_size):
    hidden, weight, bias, tokens, support, mask = problem(seed=15)
    leaves = dict(
        zip(
            ("hidden", "weight", "bias", "down", "up"),
            (hidden, weight, bias, *low_rank()),
            strict=True,
        )
    )
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    adapter = LowRank(leaves["down"], leaves["up"], 1.7)
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": chunk_size, **form}
    changed = weight + 1.7 * leaves["up"] @ leaves["down"]
    with_entropy = {"entropy_grad": True, **options}
    pairs = []
    for w, a in ((weight, adapter), (changed, None)):
        full = full_logprobs(hidden, w, tokens, candidates_BTK=support, adapter=a, **with_entropy)
        few = support_logprobs(
            hidden, w, tokens, support, adapter=a, return_logits=True, **with_entropy
        )
        pairs.append([*full, *few, support_logits(hidden, w, support, adapter=a, **options)])
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        grads = [
            torch.autograd.grad(x.sin().sum(), wanted, retain_graph=True, allow_unused=True)
            for x in (one, other)
        ]
        for mine, expected in zip(*grads, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_an_adapter_counts_in_ranks_and_the_top_k():
    hidden, weight, bias, tokens, _, mask = problem(seed=15)
    down, up = low_rank()
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3}
    changed, adapter = weight + 1.7 * up @ down, LowRank(down, up, 1.7)
    for function, argument in ((full_ranks, tokens), (full_top_k, 4)):
        result = function(hidden, weight, argument, adapter=adapter, **options)
        assert torch.equal(result, function(hidden, changed, argument, **options))
        assert not torch.equal(result, function(hidden, weight, argument, **options))


def test_a_float32_adapter_over_a_bfloat16_head_stays_float32():
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.bfloat16)
    down, up = (x.requires_grad_() for x in low_rank(dtype=torch.float32))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = support_logits(hidden, weight, support, adapter=LowRank(down, up))
            loss = (
                full_logprobs(hidden, weight, tokens, adapter=LowRank(down, up))[0].sum() + z.sum()
            )
        loss.backward()
        base = support_logits(hidden, weight, support)
        more = torch.einsum("btd,rd,btkr->btk", hidden.float(), down, up[support])
        torch.testing.assert_close(z, base + more, rtol=1e-5, atol=1e-5)
        results.append((z.detach(), down.grad, up.grad))
        down.grad = up.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_dropout_of_an_adapter_keeps_the_mean():
    hidden, weight, _, _, support, _ = problem()
    down, up = low_rank()
    exact = support_logits(hidden, weight, support, adapter=LowRank(down, up))
    draws = torch.stack(
        [
            support_logits(hidden, weight, support, adapter=LowRank(down, up, dropout=0.5))
            for _ in range(2000)
        ]
    )
    assert (draws[0] - draws[1]).abs().max() > 0.1
    # six standard errors for each of the logits: together a false alarm in 1e-6 of generators
    assert ((draws.mean(0) - exact).abs() < 6 * draws.std(0) / 2000**0.5).all()
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\), got 1"):
        LowRank(down, up, dropout=1)
    with pytest.raises(ValueError, match=r"`up_VR` must have shape \[V, R=2\]"):
        LowRank(down, up[:, :1])
    with pytest.raises(ValueError, match=r"`up_VR` must have shape \[V=11, R"):
        support_logits(hidden, weight, support, adapter=LowRank(down, up[:-1]))
