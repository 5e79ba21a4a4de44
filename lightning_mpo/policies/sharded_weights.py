"""Passes over sharded weights (FSDP2) outside the training step: gathered, or in lockstep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Shards
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.value import SeparateCritic


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder, the units that FSDP2 gathers.

    Raises:
        UserError: they cannot be found.
    """
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    names = set(getattr(decoder, "_no_split_modules", None) or [])
    matching = [module for module in decoder.modules() if type(module).__name__ in names]
    if not matching:
        raise UserError(
            f"FSDP2 shards a model layer by layer, and `{type(decoder).__name__}` has no `layers` "
            "and names none in `_no_split_modules`; use `trainer.strategy: ddp`, or another model "
            "class"
        )
    return matching


class ShardedWeights(Shards):
    """The sharded weights of a policy, for forward passes outside the training step.

    Under FSDP each pass of a layer is a collective, and sampling takes different numbers of passes
    on each process. With `policy.gather_rollouts` all weights are gathered during a rollout, and no
    process waits for another. Without, they are gathered layer by layer, and processes that have
    finished take part in the passes of the others.

    Args:
        policy: sharded.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
        from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

        from lightning_mpo.scores import TokenScores

        # FSDP2 looks for tensors with gradient in the result of `score`
        if TokenScores not in SUPPORTED_NODES:
            register_dataclass(TokenScores)
        register_fsdp_forward_method(policy, "score")
        self.policy = policy
        self.root = next(module for module in policy.modules() if isinstance(module, FSDPModule))
        # decoders announce each pass
        self.streams = self._streams()
        for index, stream in enumerate(self.streams):
            stream.register_forward_pre_hook(
                lambda module, inputs, index=index: self._announce(index)
            )
        # FSDP's groups: all, and all but the layers
        layered = {layer for stream in self.streams for layer in decoder_layers(stream)}
        groups = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        self._all = groups
        self._outer = [module for module in groups if module not in layered]
        self._held: list[Any] = []
        self._depth = self._lockstep_depth = 0
        self._serving = False
        self._wake()

    def _streams(self) -> list[nn.Module]:
        """Return the decoders, which run once per token that is sampled."""
        policy = self.policy
        networks = [policy.network, policy.reference_network]
        streams: list[nn.Module] = [n.get_decoder() for n in networks if n is not None]
        if isinstance(policy.critic, SeparateCritic) and policy.critic.trunk is not None:
            streams.append(policy.critic.trunk)
        return streams

    def _wake(self) -> None:
        """Pass through the root once: FSDP2 takes the module that runs first as the root."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        policy: Any = self.policy
        policy.wake = lambda: None
        register_fsdp_forward_method(policy, "wake")
        with torch.no_grad():
            policy.wake()
        del policy.wake
        self.root.reshard()

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Keep all weights gathered, or without `gather_rollouts` all but the layers. Nests."""
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
        """Allow different numbers of passes without gradient on each process. Nests.

        All processes enter, and all leave together.
        """
        with self.full_weights():
            self._lockstep_depth += 1
            try:
                yield
                if self._lockstep_depth == 1:
                    self._announce(None)
            finally:
                self._lockstep_depth -= 1

    def _announce(self, index: int | None) -> None:
        """Take part in passes of other processes until it is the turn of one's own.

        Args:
            index: the stream of the next pass; None: take part until no process needs a pass.
        """
        if not self._lockstep_depth or self._serving or self.policy.gather_rollouts:
            return
        while True:
            requests = torch.zeros(len(self.streams), device=self.policy.device)
            if index is not None:
                requests[index] = 1
            dist.all_reduce(requests)
            requested = requests.nonzero().flatten().tolist()
            if not requested or requested[0] == index:
                return
            self._serve(self.streams[requested[0]])

    def _serve(self, stream: nn.Module) -> None:
        """Take part in a pass of other processes, over a dummy token."""
        self._serving = True
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.policy.device)
            with torch.no_grad():
                stream(input_ids=token, use_cache=False)
        finally:
            self._serving = False
