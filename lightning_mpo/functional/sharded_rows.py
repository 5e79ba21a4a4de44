"""Rows of a weight that is sharded over processes (FSDP2's `DTensor`): the rows that are needed, not the matrix.

Every process asks for its own rows; owners send them, and in the backward pass receive their gradients. All processes take
part in every call, also one that needs no row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "device_mesh")


def whole(weight: Any) -> Any:
    """Return a weight in one piece, on every process; its gradient is averaged over them. None stays None."""
    if weight is None or not sharded(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def rows_of(weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table with the rows that ids name, and their ids in it: of a sharded weight, the distinct rows only."""
    if not sharded(weight):
        return weight, ids
    needed, places = ids.unique(return_inverse=True)
    return gather_rows(weight, needed), places


def gather_rows(weight_VD: Any, ids_n: Tensor) -> Tensor:
    """Fetch rows of a weight whose first dimension is sharded over a one-dimensional mesh.

        rows_i = W[id_i];   dL/dW[v] = (1/R) Σ_ranks Σ_{i: id_i = v} dL/drows_i

    The gradient is averaged over the R processes, as that of every other weight under FSDP, whose losses are scaled up by
    R for this reason. What travels is n rows of D numbers in each direction, against V for the whole matrix.

    Args:
        weight_VD: The weight, a `DTensor` of shape ``[V, D]`` (or ``[V]``, a bias); shards may be uneven or empty.
        ids_n: Ids of the rows, ascending, int64, shape ``[n]``; each process has its own.

    Returns:
        The rows on this process, shape ``[n, D]`` (or ``[n]``), with gradient to the shards.

    Raises:
        ValueError: If the weight is laid out in another way.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = weight_VD.device_mesh, weight_VD.placements
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            f"`weight_VD` must be sharded on dimension 0 over a one-dimensional mesh to gather rows, got {placements} over "
            f"a mesh of {mesh.ndim} dimensions; gather it whole with `full_tensor()`"
        )
    world = mesh.size()
    size = -(-weight_VD.shape[0] // world)  # of a shard, as `torch.chunk` cuts
    bounds = torch.arange(1, world, device=ids_n.device) * size
    cuts = torch.searchsorted(ids_n.contiguous(), bounds).tolist()
    counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, len(ids_n)], strict=True)]
    start = mesh.get_local_rank() * size
    rows: Tensor = _Exchange.apply(weight_VD.to_local(), ids_n, counts, start, mesh.get_group())
    return rows


class _Exchange(torch.autograd.Function):
    """Ids to their owners, rows back; in the backward pass gradients to the owners."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, ids: Tensor, counts: list[int], start: int, group: Any
    ) -> Tensor:
        """Return the rows that this process asked for."""
        asked = torch.tensor(counts, device=ids.device)
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked, group=group)
        sent: list[int] = wanted.tolist()
        requests = ids.new_empty(sum(sent))
        dist.all_to_all_single(requests, ids.contiguous(), sent, counts, group=group)
        own = requests - start
        rows = local.new_empty(len(ids), *local.shape[1:])
        dist.all_to_all_single(rows, local.index_select(0, own), counts, sent, group=group)
        ctx.save_for_backward(own)
        ctx.shape, ctx.counts, ctx.sent, ctx.group = local.shape, counts, sent, group
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Return the mean over processes of the gradients of this process's shard."""
        (own,) = ctx.saved_tensors
        received = grad_rows.new_empty(len(own), *grad_rows.shape[1:])
        dist.all_to_all_single(
            received, grad_rows.contiguous(), ctx.sent, ctx.counts, group=ctx.group
        )
        grad = grad_rows.new_zeros(ctx.shape).index_add_(0, own, received)
        return grad / dist.get_world_size(ctx.group), None, None, None, None
