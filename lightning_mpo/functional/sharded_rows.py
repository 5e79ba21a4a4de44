"""Rows of a weight that is sharded over processes (FSDP2's `DTensor`), without the whole matrix.

Every process requests the rows that it needs. Their owners send them, and receive their gradients
in the backward pass. Each call is a collective, also for a process that needs no row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "device_mesh")


def full_weight(weight: Any) -> Any:
    """Gather a weight on every process, its gradient averaged over them; None stays None."""
    if weight is None or not is_sharded(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def rows_of(weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table of rows, and the row of each id in it.

    Of a sharded weight the table holds the distinct rows that `ids` names, else it is the weight.
    """
    if not is_sharded(weight):
        return weight, ids
    distinct, row_of_id = ids.unique(return_inverse=True)
    return gather_rows(weight, distinct), row_of_id


def gather_rows(weight_VD: Any, ids_n: Tensor) -> Tensor:
    """Fetch rows of a weight whose first dimension is sharded over a one-dimensional mesh.

        rows_i = W[id_i];   dL/dW[v] = (1/R) Σ_ranks Σ_{i: id_i = v} dL/drows_i

    The gradient is averaged over the R processes, as that of every other weight under FSDP. Losses
    are scaled up by R for this reason. In each direction n rows travel, instead of V.

    Args:
        weight_VD: The weight, a `DTensor` of shape ``[V, D]``, or a bias of shape ``[V]``. Shards
            may be uneven or empty.
        ids_n: Ids of the rows, ascending, int64, shape ``[n]``; different on each process.

    Returns:
        The rows on this process, shape ``[n, D]`` (or ``[n]``), with gradient to the shards.

    Raises:
        ValueError: If the weight is laid out in another way.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = weight_VD.device_mesh, weight_VD.placements
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            "`weight_VD` must be sharded on dimension 0 over a one-dimensional mesh to gather "
            f"rows, got {placements} over a mesh of {mesh.ndim} dimensions; gather it whole with "
            "`full_tensor()`"
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
        """Return the rows that this process requests."""
        # how many rows each process requests of this one
        request_counts = torch.tensor(counts, device=ids.device)
        send_counts = torch.empty_like(request_counts)
        dist.all_to_all_single(send_counts, request_counts, group=group)
        sent: list[int] = send_counts.tolist()
        # which rows
        requests = ids.new_empty(sum(sent))
        dist.all_to_all_single(requests, ids.contiguous(), sent, counts, group=group)
        local_ids = requests - start
        # the rows themselves
        rows = local.new_empty(len(ids), *local.shape[1:])
        dist.all_to_all_single(rows, local.index_select(0, local_ids), counts, sent, group=group)
        ctx.save_for_backward(local_ids)
        ctx.shape, ctx.counts, ctx.sent, ctx.group = local.shape, counts, sent, group
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Return the mean over processes of the gradients of this process's shard."""
        (local_ids,) = ctx.saved_tensors
        received = grad_rows.new_empty(len(local_ids), *grad_rows.shape[1:])
        dist.all_to_all_single(
            received, grad_rows.contiguous(), ctx.sent, ctx.counts, group=ctx.group
        )
        grad = grad_rows.new_zeros(ctx.shape).index_add_(0, local_ids, received)
        return grad / dist.get_world_size(ctx.group), None, None, None, None
