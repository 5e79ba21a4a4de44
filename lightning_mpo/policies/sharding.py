"""Policies in shards (FSDP2): every process holds a part of each weight and gathers what it computes with.

Units are the decoder layers, also those of reference, critic and multi-token heads. All other weights of the policy
(embeddings, norms, heads) form the root group, which is gathered once per scoring, so that scoring works on plain tensors
and a support head reads its rows as it does on one process.

Rank 0 loads the model into its main memory as a run on one process would, the others lay out the same modules without
weights; then one weight after the other travels to the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy, Shards
from lightning_mpo.policies.causal import CausalPolicy
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
    """Build a policy whose weights are spread over the processes of a mesh. A second call does nothing.

    Args:
        policy: not built yet.
        mesh: one-dimensional, over all processes.
        device: of this process's shards.
        reference: keep the initial policy scorable.
        freeze: freezes what is not trained; called between building and sharding.

    Raises:
        UserError: the policy cannot be sharded, or cannot be built; on all processes alike.
    """
    if policy.shards is not None:
        return
    if not isinstance(policy, CausalPolicy):
        raise UserError(
            f"FSDP2 shards a `CausalPolicy`, got {type(policy).__name__}; use `trainer.strategy: ddp`"
        )
    if policy.lora is not None:
        raise UserError(
            "FSDP2 is for full fine-tuning, and `policy.lora` trains next to nothing of what it would shard; use "
            "`trainer.strategy: ddp` (-c ddp), or leave `lora` out"
        )
    decoder_layers(policy.outline_network().get_decoder())  # refuses before anything is loaded
    _agree(
        lambda: (
            policy.build(device=torch.device("cpu"), reference=False)
            if dist.get_rank() == 0
            else None
        )
    )
    if dist.get_rank():
        policy.outline()
    if reference:
        policy.reference_network = policy.outline_network().requires_grad_(False).eval()
    freeze()
    _spread(policy, mesh, device)
    policy.shards = ShardedWeights(policy)


def _agree(work: Callable[[], None]) -> None:
    """Do something that may fail on one process and raise its error on all: the others would wait for ever."""
    own: Exception | None = None
    try:
        work()
    except Exception as error:
        own = error
    kind = UserError if isinstance(own, UserError) else RuntimeError
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if own is None else (kind, str(own) or repr(own)))
    if own is not None:
        raise own
    for rank, other in enumerate(said):
        if other is not None:
            raise other[0](other[1] if other[0] is UserError else f"rank {rank} failed: {other[1]}")


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder, which are what FSDP2 gathers at a time.

    Raises:
        UserError: they cannot be found.
    """
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    names = set(getattr(decoder, "_no_split_modules", None) or [])
    found = [module for module in decoder.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(
            f"FSDP2 shards a model layer by layer, and `{type(decoder).__name__}` has no `layers` and names none in "
            "`_no_split_modules`; use `trainer.strategy: ddp`, or another model class"
        )
    return found


# --- weights into shards ----------------------------------------------------------------------------------------------


def _spread(policy: CausalPolicy, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard the modules and bring rank 0's weights to their places, one at a time."""
    tensors = dict(_tensors(policy))
    source = {name: tensors[_origin(name)].detach() for name in tensors}
    kinds = {name: (value.shape, value.dtype) for name, value in source.items()}
    policy.cold_parts, kinds = _from_first((policy.cold_parts, kinds))
    _take_kinds(tensors, kinds)
    _shard_modules(policy, mesh)
    policy.to_empty(device=device)
    with torch.no_grad():
        for name, weight in _tensors(policy):
            value = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            if dist.get_rank() == 0:
                value.copy_(source[name])
            _fill(weight, value, mesh)


def _fill(weight: Any, value: Tensor, mesh: DeviceMesh) -> None:
    """Put a value that rank 0 holds into a weight in shards, or into a buffer that each process has."""
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
    """Return the weight that another one starts as: the reference is the initial policy."""
    return name.replace("reference_network.", "network.", 1)


def _take_kinds(
    tensors: dict[str, Tensor], kinds: dict[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """Give what is laid out the number formats of the model that rank 0 built."""
    shapes = {name: value.shape for name, value in tensors.items()}
    expected = {name: shape for name, (shape, _) in kinds.items()}
    if shapes != expected:
        other = sorted(
            name
            for name in shapes.keys() | expected.keys()
            if shapes.get(name) != expected.get(name)
        )
        raise RuntimeError(
            f"rank {dist.get_rank()} laid out other weights than rank 0 built, such as {other[0]!r}"
        )
    for name, value in tensors.items():
        value.data = value.data.to(kinds[name][1])


def _from_first(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def _shard_modules(policy: CausalPolicy, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    assert policy.network is not None
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


# --- what rollouts need of them ---------------------------------------------------------------------------------------


class ShardedWeights(Shards):
    """The weights of a policy in shards, as forward passes outside the training step need them.

    Under FSDP each pass of a layer is a meeting of all processes, and sampling takes a different number of passes on each.
    So either whole weights are gathered for as long as a rollout takes (`policy.gather_rollouts`), and no process waits for
    another; or they are gathered layer by layer, and processes that have finished go on for those that have not.

    Args:
        policy: sharded.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
        from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

        from lightning_mpo.scores import TokenScores

        if TokenScores not in SUPPORTED_NODES:
            register_dataclass(
                TokenScores
            )  # FSDP2 looks for tensors with gradient in what `score` returns
        register_fsdp_forward_method(policy, "score")
        self.policy = policy
        self.root = next(module for module in policy.modules() if isinstance(module, FSDPModule))
        self.streams = self._streams()
        for index, stream in enumerate(self.streams):
            stream.register_forward_pre_hook(
                lambda module, inputs, index=index: self._announce(index)
            )
        layered = {layer for stream in self.streams for layer in decoder_layers(stream)}
        groups = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        self._all = groups
        self._outer = [module for module in groups if module not in layered]
        self._held: list[Any] = []
        self._depth = self._steps = 0
        self._serving = False
        self._wake()

    def _streams(self) -> list[nn.Module]:
        """Return the decoders, which run once per token that is sampled."""
        policy = self.policy
        networks = [policy.network, policy.reference_network]
        streams: list[nn.Module] = [
            network.get_decoder() for network in networks if network is not None
        ]
        if isinstance(policy.critic, SeparateCritic) and policy.critic.trunk is not None:
            streams.append(policy.critic.trunk)
        return streams

    def _wake(self) -> None:
        """Pass through the root once: whichever module runs first is the root to FSDP2."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.policy.wake = lambda: None  # type: ignore[assignment]
        register_fsdp_forward_method(self.policy, "wake")
        with torch.no_grad():
            self.policy.wake()  # type: ignore[operator]
        del self.policy.wake
        self.root.reshard()

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Keep weights gathered: all of them, or without `gather_rollouts` all but the layers. Nests."""
        if self._depth == 0:
            self._held = self._all if self.policy.gather_rollouts else self._outer
            for module in self._held:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for module in self._held:
                    module.reshard()
                    module.set_reshard_after_forward(module is not self.root, recurse=False)

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Let processes make different numbers of passes without gradient; all of them enter, and leave together. Nests."""
        with self.full_weights():
            self._steps += 1
            try:
                yield
                if self._steps == 1:
                    self._announce(None)
            finally:
                self._steps -= 1

    def _announce(self, index: int | None) -> None:
        """Wait until it is this stream's turn, and serve the others' passes until then; None: until all are done."""
        if not self._steps or self._serving or self.policy.gather_rollouts:
            return
        while True:
            wanted = torch.zeros(len(self.streams), device=self.policy.device)
            if index is not None:
                wanted[index] = 1
            dist.all_reduce(wanted)
            asked = wanted.nonzero().flatten().tolist()
            if not asked or asked[0] == index:
                return
            self._serve(self.streams[asked[0]])

    def _serve(self, stream: nn.Module) -> None:
        """Take part in a pass of other processes, over one token that nobody reads."""
        self._serving = True
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.policy.device)
            with torch.no_grad():
                stream(input_ids=token, use_cache=False)
        finally:
            self._serving = False
