"""Runs a model on tensors without data and counts the bytes that would be alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that operations make. Needs tensors without data.

    Numbers that are read from a tensor (range checks) come out as 0, as there is no data to read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        return out

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that existed before."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@contextmanager
def without_data(network: nn.Module) -> Iterator[None]:
    """Replace a meta network's weights by CPU tensors without data; tied weights stay tied."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, nn.Parameter] = {}
        for module in network.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None:
                    continue
                if id(weight) not in made:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def peak_of(work: Callable[[], None], network: nn.Module) -> int:
    """Return the most bytes of living tensors that a piece of work has made.

    Args:
        work: the piece of work.
        network: its weights exist already; views of them are no new bytes.
    """
    counter = LiveBytes()
    for tensor in (*network.parameters(), *network.buffers()):
        counter.leave_out(tensor)
    with counter:
        work()
    return counter.peak


def extrapolate(peak: Callable[[int], int], layers: int) -> int:
    """Return the peak of a model from two shallow ones; each further layer costs the same."""
    shallow, deep = min(2, layers), min(4, layers)
    low = peak(shallow)
    if deep == shallow:
        return low
    return round(low + (peak(deep) - low) / (deep - shallow) * (layers - shallow))
