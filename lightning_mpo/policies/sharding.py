"""Builds policies in shards (FSDP2): every process holds a part of each weight.

Units are the decoder layers, also those of reference, critic and multi-token heads. All other
weights of the policy (embeddings, norms, heads) form the root group. It is gathered once per
scoring, so scoring works on plain tensors, and a support head reads its rows as on one process.

Rank 0 loads the model into its main memory as a run on one process does. The others lay out the
same modules without weights. Then one weight after the other travels to the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.sharded_weights import ShardedWeights, decoder_layers
from lightning_mpo.policies.value import SeparateCritic

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build_in_shards(
    policy: Policy,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    reference: bool,
    freeze: Callable[[], None],
) -> None:
    """Build a policy with its weights spread over a mesh. A second call does nothing.

    Args:
        policy: not built yet.
        mesh: one-dimensional, over all processes.
        device: of this process's shards.
        reference: keep the initial policy scorable.
        freeze: freezes weights that are not trained; called between building and sharding.

    Raises:
        UserError: the policy cannot be sharded, or cannot be built; on all processes alike.
    """
    if policy.shards is not None:
        return
    if not isinstance(policy, CausalPolicy):
        raise UserError(
            f"FSDP2 shards a `CausalPolicy`, got {type(policy).__name__}; use "
            "`trainer.strategy: ddp`"
        )
    if policy.lora is not None:
        raise UserError(
            "FSDP2 is for full fine-tuning, and `policy.lora` trains next to nothing of what it "
            "would shard; use `trainer.strategy: ddp` (-c ddp), or leave `lora` out"
        )
    # a decoder without layers is refused before anything is loaded
    decoder_layers(policy.outline_network().get_decoder())
    is_first = dist.get_rank() == 0

    # a reference with weights of its own is loaded beside the policy, another one copies it
    has_weights = reference and policy.reference_checkpoint is not None

    def load() -> None:
        if is_first:
            policy.build(device=torch.device("cpu"), reference=has_weights)

    # weights on rank 0, modules without weights on the others
    _run_or_fail_together(load)
    if not is_first:
        policy.outline()
    if reference and policy.reference_network is None:
        policy.reference_network = policy.outline_network().requires_grad_(False).eval()
    freeze()
    # from rank 0 into the shards
    _spread(policy, mesh, device)
    policy.shards = ShardedWeights(policy)


def _run_or_fail_together(work: Callable[[], None]) -> None:
    """Run work that may fail on one process, and raise its error on all, so that none waits."""
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    # kind and message of each rank's error
    kind = UserError if isinstance(error, UserError) else RuntimeError
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else (kind, str(error) or repr(error)))
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise other[0](other[1] if other[0] is UserError else f"rank {rank} failed: {other[1]}")


def _spread(policy: CausalPolicy, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard the modules and copy rank 0's weights into the shards, one at a time."""
    # rank 0's tensors; the others take over their names, shapes and dtypes
    tensors = dict(_tensors(policy))
    copies = policy.reference_checkpoint is None
    source = {name: tensors[_origin(name) if copies else name].detach() for name in tensors}
    kinds = {name: (value.shape, value.dtype) for name, value in source.items()}
    policy.cold_parts, kinds = _from_first((policy.cold_parts, kinds))
    _take_kinds(tensors, kinds)
    _shard_modules(policy, mesh)
    policy.to_empty(device=device)
    # values
    with torch.no_grad():
        for name, weight in _tensors(policy):
            value = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            if dist.get_rank() == 0:
                value.copy_(source[name])
            _fill(weight, value, mesh)


def _fill(weight: Any, value: Tensor, mesh: DeviceMesh) -> None:
    """Copy rank 0's value into a sharded weight, or into a buffer of every process."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.contiguous()
    if isinstance(weight, DTensor):
        weight.to_local().copy_(distribute_tensor(value, mesh, weight.placements).to_local())
    else:
        dist.broadcast(value, 0)
        weight.copy_(value)


def _tensors(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and buffers by name; tied ones once."""
    yield from policy.named_parameters()
    yield from policy.named_buffers()


def _origin(name: str) -> str:
    """Return the name of the weight with this one's value, where the reference copies the policy."""
    return name.replace("reference_network.", "network.", 1)


def _take_kinds(
    tensors: dict[str, Tensor], kinds: dict[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """Convert tensors without values to the dtypes of the model that rank 0 built."""
    shapes = {name: value.shape for name, value in tensors.items()}
    expected = {name: shape for name, (shape, _) in kinds.items()}
    if shapes != expected:
        names = shapes.keys() | expected.keys()
        different = min(name for name in names if shapes.get(name) != expected.get(name))
        raise RuntimeError(
            f"rank {dist.get_rank()} laid out other weights than rank 0 built, such as "
            f"{different!r}"
        )
    for name, value in tensors.items():
        value.data = value.data.to(kinds[name][1])


def _from_first(value: Any) -> Any:
    """Return rank 0's value."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def _shard_modules(policy: CausalPolicy, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    units = decoder_layers(policy.network.get_decoder())
    if policy.reference_network is not None:
        units += [*decoder_layers(policy.reference_network.get_decoder()), policy.reference_network]
    if isinstance(policy.critic, SeparateCritic) and policy.critic.trunk is not None:
        units += [*decoder_layers(policy.critic.trunk), policy.critic.trunk]
    if policy.mtp is not None:
        units += list(getattr(policy.mtp, "layers", ()))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(policy, mesh=mesh)
