"""Both heads against plain loops, finite differences and each other; and what they must never build."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mpo.functional import head_gradients
from lightning_mpo.functional.heads import full_logprobs, support_logits, support_logprobs
from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.ranking import full_ranks, full_top_k

B, T, V, D, K = 2, 4, 11, 5, 3
FORMS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.5, "temperature": 1.3},
    {"softcap": 1.5},
    {"softcap": 2.0, "scale": 1.7, "temperature": 0.6},
]


def problem(dtype=torch.float64, seed=0, v=V, d=D, lead=(B, T), k=K):
    """Random inputs; every token is in its support, at a random slot."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*lead, d, generator=g, dtype=torch.float64)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64)
    bias = torch.randn(v, generator=g, dtype=torch.float64)
    support = torch.rand(*lead, v, generator=g).argsort(-1)[..., :k].contiguous()
    slot = torch.randint(k, lead, generator=g)
    tokens = support.gather(-1, slot.unsqueeze(-1)).squeeze(-1)
    mask = torch.rand(*lead, generator=g) > 0.3
    mask[..., 0] = True
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), tokens, support, mask


def loop_logits(hidden, weight, bias=None, temperature=1.0, scale=1.0, softcap=None) -> list[float]:
    """Logits of one position, one float at a time."""
    out = []
    for v, row in enumerate(weight.tolist()):
        x = sum(a * b for a, b in zip(hidden.tolist(), row, strict=True)) + (
            0.0 if bias is None else float(bias[v])
        )
        x *= scale
        if softcap is not None:
            x = softcap * math.tanh(x / softcap)
        out.append(x / temperature)
    return out


def loop_score(logits: list[float], chosen: int, ids) -> tuple[float, float]:
    """Log-probability of one id and the entropy, under a softmax over some ids."""
    total = sum(math.exp(logits[v]) for v in ids)
    probabilities = [math.exp(logits[v]) / total for v in ids]
    return logits[chosen] - math.log(total), -sum(p * math.log(p) for p in probabilities)


def dense(hidden, weight, bias=None, temperature=1.0, scale=1.0, softcap=None) -> Tensor:
    """Logits [B, T, V] in one piece, for gradients by autograd."""
    x = (torch.einsum("...d,vd->...v", hidden, weight) + (0 if bias is None else bias)) * scale
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


# ---- full head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_full_head_is_the_definition(form, with_bias):
    hidden, weight, bias, tokens, support, mask = problem()
    bias = bias if with_bias else None
    logprobs, entropy, candidates = full_logprobs(
        hidden,
        weight,
        tokens,
        mask_BT=mask,
        bias_V=bias,
        candidates_BTK=support,
        chunk_size=3,
        **form,
    )
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                assert logprobs[b, t] == 0
                assert entropy[b, t] == 0
                assert (candidates[b, t] == 0).all()
                continue
            z = loop_logits(hidden[b, t], weight, bias, **form)
            expected, expected_entropy = loop_score(z, int(tokens[b, t]), range(V))
            assert float(logprobs[b, t]) == pytest.approx(expected, rel=1e-12)
            assert float(entropy[b, t]) == pytest.approx(expected_entropy, rel=1e-12)
            for k in range(K):
                expected, _ = loop_score(z, int(support[b, t, k]), range(V))
                assert float(candidates[b, t, k]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "trained", ["hidden", "hidden weight", "hidden bias", "hidden weight bias", "weight"]
)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_full_head_gradient_is_that_of_finite_differences(form, trained, entropy_grad):
    hidden, weight, bias, tokens, support, mask = problem(seed=1)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trained.split())

    def outputs(hidden, weight, bias):
        out = full_logprobs(
            hidden,
            weight,
            tokens,
            mask_BT=mask,
            bias_V=bias,
            candidates_BTK=support,
            entropy_grad=entropy_grad,
            chunk_size=3,
            **form,
        )
        return out if entropy_grad else (out[0], out[2])

    assert gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_frozen_and_trained_heads_give_the_same_gradient(entropy_grad):
    hidden, weight, _, tokens, support, mask = problem(seed=2)
    grads = []
    for trained in (False, True):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(trained)
        logprobs, entropy, candidates = full_logprobs(
            leaf,
            head,
            tokens,
            mask_BT=mask,
            softcap=2.0,
            candidates_BTK=support,
            entropy_grad=entropy_grad,
        )
        (
            logprobs.sin().sum()
            + candidates.cos().sum()
            + (entropy.square().sum() if entropy_grad else 0)
        ).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_full_head_gradient_is_that_of_a_dense_log_softmax():
    hidden, weight, bias, tokens, _, mask = problem(seed=3)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    others = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (
        full_logprobs(leaves[0], leaves[1], tokens, mask_BT=mask, bias_V=leaves[2])[0] * upstream
    ).sum().backward()
    reference = dense(*others).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    (reference * upstream * mask).sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_entropy_carries_a_gradient_only_if_asked():
    hidden, weight, _, tokens, support, _ = problem()
    hidden.requires_grad_()
    assert not full_logprobs(hidden, weight, tokens)[1].requires_grad
    assert full_logprobs(hidden, weight, tokens, entropy_grad=True)[1].requires_grad
    assert not support_logprobs(hidden, weight, tokens, support)[1].requires_grad
    assert support_logprobs(hidden, weight, tokens, support, entropy_grad=True)[1].requires_grad


# ---- what both heads share -------------------------------------------------------------------------------------------


def both_heads(hidden, weight, tokens, support, **options):
    """Return the differentiable outputs of both heads, summed with fixed factors, and the outputs."""
    full = full_logprobs(hidden, weight, tokens, entropy_grad=True, **options)
    small = support_logprobs(hidden, weight, tokens, support, entropy_grad=True, **options)
    return [*full, *small, support_logits(hidden, weight, support, **options)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_change_nothing(trained, chunk_size):
    results = []
    for size in (None, chunk_size):
        hidden, weight, _, tokens, support, mask = problem(seed=4)
        hidden.requires_grad_()
        weight.requires_grad_(trained)
        outputs = both_heads(
            hidden, weight, tokens, support, mask_BT=mask, softcap=3.0, chunk_size=size
        )
        sum(x.square().sum() for x in outputs).backward()
        results.append(
            [x.detach() for x in outputs] + [hidden.grad] + ([weight.grad] if trained else [])
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_leading_shapes_and_order_of_rows_do_not_matter():
    hidden, weight, _, tokens, support, mask = problem(seed=5)
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    flat = [x.flatten(0, 1)[order] for x in (hidden, tokens, support, mask)]
    shuffled = both_heads(flat[0], weight, flat[1], flat[2], mask_BT=flat[3])
    for one, other in zip(outputs, shuffled, strict=True):
        torch.testing.assert_close(one.flatten(0, 1)[order], other, rtol=1e-12, atol=0)


def test_masked_positions_are_never_read():
    hidden, weight, _, tokens, support, mask = problem(seed=6)
    assert not mask.all()
    clean = hidden.clone().requires_grad_()
    dirty = torch.where(mask.unsqueeze(-1), hidden, torch.nan).requires_grad_()
    bad_tokens = torch.where(mask, tokens, -100)
    bad_support = torch.where(mask.unsqueeze(-1), support, 10**6)
    outputs = both_heads(clean, weight, tokens, support, mask_BT=mask)
    others = both_heads(dirty, weight, bad_tokens, bad_support, mask_BT=mask)
    for one, other in zip(outputs, others, strict=True):
        assert torch.equal(one, other)
        assert (one[~mask] == 0).all()
        (grad_one,) = torch.autograd.grad(one.sum(), clean, retain_graph=True)
        (grad_other,) = torch.autograd.grad(other.sum(), dirty, retain_graph=True)
        assert torch.equal(grad_one, grad_other)
        assert (grad_one[~mask] == 0).all()


def test_an_empty_mask_gives_zeros_and_zero_gradients():
    hidden, weight, _, tokens, support, mask = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=torch.zeros_like(mask))
    sum(x.sum() for x in outputs).backward()
    assert all((x == 0).all() for x in [*outputs, hidden.grad, weight.grad])


def test_no_grad_keeps_nothing_and_gives_the_same_values():
    hidden, weight, _, tokens, support, mask = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    with torch.no_grad():
        others = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    assert not any(x.requires_grad for x in others)
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


def test_int32_ids_are_as_good_as_int64():
    hidden, weight, _, tokens, support, _ = problem()
    outputs = both_heads(hidden, weight, tokens, support)
    others = both_heads(hidden, weight, tokens.int(), support.int())
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_bfloat16_is_close_and_keeps_dtypes(dtypes, trained):
    hidden, weight, _, tokens, support, mask = problem(lead=(4, 16), v=97, d=16, k=8)
    hidden, weight = (hidden / 2).to(dtypes[0]), (weight / 2).to(dtypes[1])
    low = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    high = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    outputs, exact = (both_heads(*pair, tokens, support, mask_BT=mask) for pair in (low, high))
    for one, other in zip(outputs, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)
    for results in (outputs, exact):
        sum(x.sum() for x in results).backward()
    for leaf, other in zip(low[: 1 + trained], high, strict=False):
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.02


def test_autocast_changes_nothing():
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for enabled in (False, True):
            leaf, head = (
                hidden.to(dtype, copy=True).requires_grad_(),
                weight.clone().requires_grad_(),
            )
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = both_heads(leaf, head, tokens, support)
                sum(x.sum() for x in outputs).backward()
            results.append([*(x.detach() for x in outputs), leaf.grad, head.grad])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Allocations(TorchDispatchMode):
    """Records the storages that operations make, and keeps them alive so that no address comes twice."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.made: dict[int, tuple[int, object]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = (storage.nbytes() // x.element_size(), storage)
        return result

    def sizes(self) -> list[int]:
        return sorted((numel for numel, _ in self.made.values()), reverse=True)


def full_sizes(v, trained, n=64, d=4, chunk=4):
    hidden, weight, _, tokens, _, _ = problem(dtype=torch.float32, lead=(n,), v=v, d=d)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with Allocations(hidden, weight, tokens) as record:
        logprobs, entropy = full_logprobs(
            hidden, weight, tokens, chunk_size=chunk, entropy_grad=True
        )
        (logprobs.sum() + entropy.sum()).backward()
    return record.sizes()


@pytest.mark.parametrize("trained", [False, True])
def test_full_head_never_holds_more_than_a_chunk_of_logits(trained):
    n, v, d, chunk = 64, 900, 4, 4
    sizes = full_sizes(v, trained, n, d, chunk)
    assert sizes[0] == chunk * v == v * d
    assert sizes[0] < n * v / 10


def test_full_head_has_one_gradient_of_the_weight():
    n, v, d, chunk = (
        64,
        900,
        4,
        3,
    )  # a chunk of logits is smaller than [V, D] here, so that only the latter are counted
    assert [size for size in full_sizes(v, True, n, d, chunk) if size >= v * d] == [v * d]
    assert [size for size in full_sizes(v, False, n, d, chunk) if size >= v * d] == []


def support_sizes(v, trained, n=64, d=8, k=5, chunk=4):
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.float32, lead=(n,), v=v, d=d, k=k)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with Allocations(hidden, weight, tokens, support) as record:
        logprobs, entropy = support_logprobs(
            hidden, weight, tokens, support, chunk_size=chunk, entropy_grad=True
        )
        (logprobs.sum() + entropy.sum()).backward()
    return record.sizes()


def test_support_head_does_not_grow_with_the_vocabulary():
    n, d, k, chunk = 64, 8, 5, 4
    sizes = support_sizes(300, False, n, d, k, chunk)
    assert sizes == support_sizes(3000, False, n, d, k, chunk)
    assert sizes[0] <= max(chunk * k * d, n * d)
    assert [size for size in support_sizes(3000, True, n, d, k, chunk) if size >= 3000] == [
        3000 * d
    ]


# ---- support head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_support_head_is_the_definition(form):
    hidden, weight, bias, tokens, support, mask = problem(seed=7)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :, 0] = support[0, :, 0] == tokens[0]
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
    logits = support_logits(hidden, weight, support, **options)
    logprobs, entropy = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, **options
    )
    for b, t in mask.nonzero().tolist():
        z = loop_logits(hidden[b, t], weight, bias, **form)
        ids = [int(v) for v, in_set in zip(support[b, t], slots[b, t], strict=True) if in_set]
        expected, expected_entropy = loop_score(z, int(tokens[b, t]), ids)
        assert logits[b, t].tolist() == pytest.approx([z[v] for v in support[b, t]], rel=1e-12)
        assert float(logprobs[b, t]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert float(entropy[b, t]) == pytest.approx(expected_entropy, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "bias", "hidden weight bias"])
def test_support_head_gradient_is_that_of_finite_differences(form, trained):
    hidden, weight, bias, tokens, support, mask = problem(seed=8)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :, 0] = support[0, :, 0] == tokens[0]
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trained.split())

    def outputs(hidden, weight, bias):
        options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
        scores = support_logprobs(
            hidden, weight, tokens, support, support_mask_BTK=slots, entropy_grad=True, **options
        )
        return *scores, support_logits(hidden, weight, support, **options)

    assert gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("form", FORMS)
def test_logits_come_along_if_asked_for(form):
    hidden, weight, bias, tokens, support, mask = problem(seed=16)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[:, :, 0] = support[:, :, 0] == tokens
    assert not slots.all()
    dirty = torch.where(slots, support, 10**6)  # ids outside the vocabulary in slots that hold none
    options = {"mask_BT": mask, "bias_V": bias, "support_mask_BTK": slots, "chunk_size": 3, **form}
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    plain = support_logprobs(hidden, weight, tokens, dirty, **options)
    *scores, logits = support_logprobs(hidden, weight, tokens, dirty, return_logits=True, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain, scores, strict=True))
    counts = mask.unsqueeze(-1) & slots
    expected = dense(hidden, weight, bias, **form).gather(-1, support) * counts
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=0)
    upstream = torch.randn(
        logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    leaves = (hidden, weight, bias)
    grads = torch.autograd.grad((logits * upstream).sum(), leaves)
    for one, other in zip(
        grads, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_probabilities_sum_to_one_over_the_support():
    hidden, weight, _, _, support, _ = problem()
    total = sum(
        support_logprobs(hidden, weight, support[..., k], support, temperature=0.5)[0].exp()
        for k in range(K)
    )
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


def test_a_support_of_everything_is_the_full_softmax():
    hidden, weight, bias, tokens, _, _ = problem()
    everything = torch.arange(V).expand(B, T, V)
    options = {"bias_V": bias, "temperature": 0.8, "softcap": 2.0, "entropy_grad": True}
    results = []
    for head in (
        lambda h: full_logprobs(h, weight, tokens, **options),
        lambda h: support_logprobs(h, weight, tokens, everything, **options),
    ):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = head(leaf)
        (logprobs.sin() + entropy.cos()).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gather_form_equals_the_dense_masked_form():
    hidden, weight, bias, tokens, support, mask = problem(seed=10)
    results = []
    for is_dense in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if is_dense:
            logits = dense(*leaves, temperature=0.7)
            outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, support, False)
            logprobs = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
            logprobs = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask
        else:
            logprobs, _ = support_logprobs(
                leaves[0],
                leaves[1],
                tokens,
                support,
                bias_V=leaves[2],
                mask_BT=mask,
                temperature=0.7,
            )
        (logprobs.sin()).sum().backward()
        results.append([logprobs.detach(), *(x.grad for x in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_logits_outside_the_support_are_free():
    hidden, weight, bias, tokens, support, _ = problem(seed=11)
    support = support[:1, :1].expand(B, T, K).contiguous()
    tokens = support[..., 1].contiguous()
    inside = torch.zeros(V, dtype=torch.bool).scatter(0, support[0, 0], True)
    before = support_logprobs(hidden, weight, tokens, support, bias_V=bias)
    weight2, bias2 = weight.clone(), bias + 3.0  # a constant on all logits
    weight2[~inside], bias2[~inside] = 50.0, -7.0  # anything on the others
    after = support_logprobs(hidden, weight2, tokens, support, bias_V=bias2)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    leaf = bias.clone().requires_grad_()
    support_logprobs(hidden, weight, tokens, support, bias_V=leaf)[0].sum().backward()
    assert (leaf.grad[~inside] == 0).all()
    assert abs(float(leaf.grad.sum())) < 1e-12
    assert leaf.grad[inside].abs().min() > 1e-3


def test_on_policy_ratio_is_one_and_the_classic_bug_gives_the_kept_mass():
    hidden, weight, _, tokens, support, _ = problem(seed=12)
    behaviour = support_logprobs(hidden, weight, tokens, support)[0]
    assert torch.equal(
        (support_logprobs(hidden, weight, tokens, support)[0] - behaviour).exp(), torch.ones(B, T)
    )
    ratio = (full_logprobs(hidden, weight, tokens)[0] - behaviour).exp()
    kept = dense(hidden, weight).softmax(-1).gather(-1, support).sum(-1)
    torch.testing.assert_close(ratio, kept, rtol=1e-12, atol=0)
    assert kept.max() < 0.99


def test_order_of_a_support_and_empty_slots_change_nothing():
    hidden, weight, _, tokens, support, _ = problem(seed=13)
    before = support_logprobs(hidden, weight, tokens, support)
    order = torch.rand(B, T, K).argsort(-1)
    padding = torch.full((B, T, 2), -1)
    padding[..., 1] = support[..., 0]  # a valid id in an empty slot has no mass either
    padded = torch.cat([support.gather(-1, order), padding], -1)
    slots = torch.ones_like(padded, dtype=torch.bool)
    slots[..., -2:] = False
    after = support_logprobs(hidden, weight, tokens, padded, support_mask_BTK=slots)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_support_of_one_token_has_no_entropy_and_no_nan():
    hidden, weight, _, tokens, support, _ = problem()
    hidden.requires_grad_()
    slots = support == tokens.unsqueeze(-1)
    logprobs, entropy = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, entropy_grad=True
    )
    (logprobs + entropy).sum().backward()
    assert torch.equal(logprobs, torch.zeros(B, T))
    assert torch.equal(entropy, torch.zeros(B, T))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_tokens_outside_their_support_are_counted():
    hidden, weight, _, tokens, support, mask = problem()
    mask[:] = True
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[0, :2] = support[0, :2] != tokens[0, :2].unsqueeze(-1)
    with pytest.raises(
        ValueError, match=r"`tokens_BT` must be in `support_BTK` .* got 2 of 8 tokens outside"
    ):
        support_logprobs(hidden, weight, tokens, support, support_mask_BTK=slots)
    mask[0, :2] = False
    logprobs, _ = support_logprobs(
        hidden, weight, tokens, support, support_mask_BTK=slots, mask_BT=mask
    )
    assert (logprobs[mask] < 0).all()


# ---- a low-rank adapter -----------------------------------------------------------------------------------------------


def low_rank(r=2, v=V, d=D, dtype=torch.float64):
    g = torch.Generator().manual_seed(77)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, d), (v, r))
    ]


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


@pytest.mark.parametrize("few", [False, True])
def test_an_adapter_makes_no_second_matrix(few):
    n, v, d = 64, 900, 8
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.float32, lead=(n,), v=v, d=d)
    down, up = (x.requires_grad_() for x in low_rank(v=v, d=d, dtype=torch.float32))
    hidden.requires_grad_()
    with Allocations(hidden, weight, down, up, tokens, support) as record:
        adapter = LowRank(down, up, 2.0)
        head = (support_logprobs, (support,)) if few else (full_logprobs, ())
        head[0](hidden, weight, tokens, *head[1], adapter=adapter, chunk_size=4)[0].sum().backward()
    assert record.sizes()[0] < v * d


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


# ---- the current top k ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_full_top_k_is_a_sort_by_value_and_id(k, chunk_size):
    hidden, weight, bias, _, _, mask = problem(seed=14)
    hidden, weight, bias = (x.round() for x in (hidden, weight, bias))  # many equal logits
    hidden = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    ids = full_top_k(hidden, weight, k, mask_BT=mask, bias_V=bias, chunk_size=chunk_size)
    assert ids.dtype == torch.int32
    assert (ids[~mask] == 0).all()
    for b, t in mask.nonzero().tolist():
        z = loop_logits(hidden[b, t], weight, bias)
        assert ids[b, t].tolist() == sorted(range(V), key=lambda v: (-z[v], v))[:k]


def test_the_full_top_k_holds_no_more_than_a_chunk_of_logits():
    hidden, weight, _, _, _, _ = problem(dtype=torch.float32, lead=(64,), v=900, d=4)
    with Allocations(hidden, weight) as record:
        full_top_k(hidden, weight, 3, chunk_size=4)
    assert record.sizes()[0] == 4 * 900
    for k in (0, 901):
        with pytest.raises(
            ValueError, match=f"`k` must be between 1 and the vocabulary size 900, got {k}"
        ):
            full_top_k(hidden, weight, k)


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"softcap": -1.0}, "`softcap` must be above 0, got -1.0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        (
            {"weight_VD": torch.zeros(V, D + 1)},
            rf"`weight_VD` must have shape \[V, D={D}\].*got \[{V}, {D + 1}\]",
        ),
        ({"tokens_BT": torch.zeros(B, T + 1).long()}, r"`tokens_BT` must have shape \[2, 4\]"),
        ({"bias_V": torch.zeros(V + 1)}, r"`bias_V` must have shape \[V=11\]"),
        (
            {"mask_BT": torch.ones(B, T + 1, dtype=torch.bool)},
            r"`mask_BT` must have shape \[2, 4\]",
        ),
        (
            {"candidates_BTK": torch.full((B, T, 2), V)},
            r"`candidates_BTK` must be in \[0, 11\).*got \[11, 11\]",
        ),
        ({"tokens_BT": torch.full((B, T), -1)}, r"`tokens_BT` must be in \[0, 11\)"),
    ],
)
def test_messages_of_the_full_head_name_the_argument(change, message):
    hidden, weight, _, tokens, _, _ = problem()
    arguments = {"hidden_BTD": hidden, "weight_VD": weight, "tokens_BT": tokens, **change}
    with pytest.raises(ValueError, match=message):
        full_logprobs(**arguments)


def test_messages_of_the_support_head_name_the_argument():
    hidden, weight, _, tokens, support, mask = problem()
    with pytest.raises(ValueError, match=r"`support_BTK` must be in \[0, 11\)"):
        support_logits(hidden, weight, support + V)
    with pytest.raises(ValueError, match=r"`support_mask_BTK` must have shape \[2, 4, K=3\]"):
        support_logprobs(
            hidden, weight, tokens, support, support_mask_BTK=torch.ones(B, T, 4, dtype=torch.bool)
        )
    with pytest.raises(TypeError, match=r"`mask_BT` must be bool, got torch.float64"):
        support_logprobs(hidden, weight, tokens, support, mask_BT=mask.double())
    with pytest.raises(TypeError, match=r"`support_BTK` must be int32 or int64"):
        support_logits(hidden, weight, support.double())


@pytest.mark.parametrize("frozen", [False, True])
def test_leaving_the_entropy_out_changes_no_logprob_and_no_gradient(frozen):
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.arange(7)
    results = []
    for entropy in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        logprobs, entropies = full_logprobs(h, w, ids, softcap=3.0, entropy=entropy, chunk_size=3)
        logprobs.sum().backward()
        assert bool(entropies.any()) == entropy
        results.append((logprobs.detach(), h.grad, w.grad))
    for plain, lean in zip(*results, strict=True):
        assert plain is lean is None or torch.equal(plain, lean)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "form", [{}, {"softcap": 1.5, "temperature": 0.7}], ids=["plain", "capped"]
)
def test_candidates_without_gradient_change_no_value_and_leave_the_tokens_theirs(trained, form):
    hidden, weight, bias, tokens, support, mask = problem()
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
    gradients = []
    for candidates in ({}, {"candidates_BTK": support, "candidates_grad": False}):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        scores = full_logprobs(*leaves, tokens, entropy_grad=True, **options, **candidates)
        loss = scores[0].sin().sum() + scores[1].square().sum()
        gradients.append((loss, torch.autograd.grad(loss, leaves[: 1 + trained])))
    assert not scores[2].requires_grad
    learnt = full_logprobs(hidden, weight, tokens, candidates_BTK=support, **options)[2]
    assert torch.equal(scores[2], learnt)
    for (loss, own), (other, their) in [gradients]:
        assert torch.equal(loss, other)
        assert all(map(torch.equal, own, their))


def test_a_backward_pass_reads_no_rows_of_candidates_without_gradient(monkeypatch):
    hidden, weight, _, tokens, support, _ = problem()
    rows, read = head_gradients._rows, []
    monkeypatch.setattr(
        head_gradients,
        "_rows",
        lambda w, ids, dtype: read.append(ids.shape[1]) or rows(w, ids, dtype),
    )
    for wanted, width in ((True, 1 + K), (False, 1)):
        scores = full_logprobs(
            hidden.requires_grad_(), weight, tokens, candidates_BTK=support, candidates_grad=wanted
        )
        scores[0].sum().backward()
        assert read.pop() == width
