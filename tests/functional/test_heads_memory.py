"""The heads hold no more than a chunk of logits."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_mpo.functional.low_rank import LowRank
from tests.support.head_options import full_logprobs, full_top_k, support_logprobs
from tests.support.heads import low_rank, problem


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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("supported", [False, True])
def test_a_head_works_within_a_checkpoint(trained, supported):
    """A checkpoint gives the saved tensors of a function once."""
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.float64, lead=(6,), v=30, d=4, k=5)
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def total() -> Tensor:
        if supported:
            logprobs, entropy = support_logprobs(hidden, weight, tokens, support, entropy_grad=True)
        else:
            logprobs, entropy = full_logprobs(hidden, weight, tokens, entropy_grad=True)
        return logprobs.sum() + entropy.sum()

    inputs = [hidden, weight] if trained else [hidden]
    expected = torch.autograd.grad(total(), inputs)
    again = torch.autograd.grad(checkpoint(total, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
