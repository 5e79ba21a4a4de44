"""How a module's policy is laid out over processes, and which strategies are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy

WRITE_INSTEAD = (
    "`strategy: {class_path: ModelParallelStrategy, init_args: {data_parallel_size: N, tensor_parallel_size: 1}}` with N "
    "the number of processes (configs/hardware/fsdp.yaml)"
)


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which the policy would not be trained as it should.

    Raises:
        UserError: FSDP1, or tensor parallelism.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise UserError(f"`trainer.strategy: fsdp` is FSDP1, which is not supported; write {WRITE_INSTEAD}")
    if isinstance(trainer.strategy, ModelParallelStrategy):
        size = trainer.strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise UserError(
                f"`ModelParallelStrategy` was asked for {size} processes of tensor parallelism (`auto` means all of a "
                f"node); write {WRITE_INSTEAD}"
            )


def build_policy(module: L.LightningModule, policy: Policy, *, reference: bool, freeze: Callable[[], Any]) -> None:
    """Build a module's policy: whole on each process, or in shards under `ModelParallelStrategy`.

    Args:
        module: attached to a trainer.
        policy: of the module.
        reference: keep the initial policy scorable.
        freeze: freezes what is not trained.
    """
    mesh = module.device_mesh
    if mesh is None:
        policy.build(device=module.device, reference=reference)
        freeze()
        return
    from lightning_mpo.policies.sharding import build_in_shards

    device = module.trainer.strategy.root_device
    build_in_shards(policy, mesh["data_parallel"], device, reference=reference, freeze=freeze)
