"""How a module's policy is laid out over processes, and which strategies are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy

SHARDED = (
    "`strategy: {class_path: ModelParallelStrategy, init_args: {data_parallel_size: %s, "
    "tensor_parallel_size: 1}}`"
)
"""The strategy to write instead, in a configuration."""
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables of the environment that number a process, as Lightning reads them."""


def check_strategy_options(trainer: Any) -> None:
    """Refuse strategies of parsed options that `check_strategy` would refuse later.

    Args:
        trainer: the parsed options of the trainer.

    Raises:
        UserError: FSDP1, tensor parallelism, or another number of processes.
    """
    strategy = trainer.get("strategy")
    name = str(
        strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    ).rsplit(".", 1)[-1]
    # number of processes, if it is known before the run
    devices, nodes = trainer.get("devices") or "auto", trainer.get("num_nodes") or 1
    known = str(devices).lstrip("+").isdigit() and str(nodes).isdigit()
    processes = str(int(devices) * int(nodes)) if known else "N"
    # strategies that are refused
    if name.lower().startswith("fsdp"):
        raise UserError(
            f"`trainer.strategy: {name}` is FSDP1, which is not supported; write "
            f"{SHARDED % processes}"
        )
    if name in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        raise UserError(
            f"`trainer.strategy: {name}` copies this process, which hangs or loses the run; write "
            "`ddp`"
        )
    if name != "ModelParallelStrategy":
        return
    # the mesh must fit the processes
    options = strategy.get("init_args") or {}
    sizes = [options.get(key, "auto") for key in ("data_parallel_size", "tensor_parallel_size")]
    if sizes[1] != 1 or sizes[0] == "auto" or (known and int(sizes[0]) != int(processes)):
        raise UserError(
            f"`ModelParallelStrategy` has data_parallel_size {sizes[0]} and tensor_parallel_size "
            f"{sizes[1]}, and there are {processes} processes (`trainer.devices` x "
            f"`trainer.num_nodes`); write {SHARDED % processes}"
        )


def check_alone(trainer: L.Trainer) -> None:
    """Refuse a single process that the environment numbers as a later one: it writes no metrics.

    Raises:
        UserError: a variable of the environment names this process as another than the first.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    name = next((name for name in RANKS if rank and os.environ.get(name) == str(rank)), None)
    if trainer.world_size == 1 and name is not None:
        raise UserError(
            f"the environment variable {name} is {rank}, which makes this one of several "
            "processes, but `trainer.devices` and `trainer.strategy` make it the only one: unset "
            f"{name}, or give `trainer.strategy: ddp` and the number of devices"
        )


def check_nodes(trainer: L.Trainer) -> None:
    """Refuse several nodes without a launcher; the first one would wait for half an hour.

    Raises:
        UserError: no launcher started this process, and the variables of the environment are
            missing that say where the first node is.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes < 2 or not isinstance(environment, LightningEnvironment):
        return
    missing = [
        name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)
    ]
    if "NODE_RANK" in missing and os.environ.get("GROUP_RANK"):
        missing.remove("NODE_RANK")
    if missing:
        raise UserError(
            f"`trainer.num_nodes: {trainer.num_nodes}` needs a launcher that starts a process on "
            f"each node, such as torchrun or srun; or set {', '.join(missing)} yourself on each "
            "node"
        )
    print(
        f"nodes      {environment.node_rank() + 1} of {trainer.num_nodes}: waits at "
        f"{environment.main_address}:{environment.main_port} until all are there",
        flush=True,
    )


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which the policy would not be trained as it should.

    Raises:
        UserError: FSDP1, or tensor parallelism.
    """
    size = trainer.world_size
    if isinstance(trainer.strategy, FSDPStrategy):
        raise UserError(
            f"`trainer.strategy: fsdp` is FSDP1, which is not supported; write {SHARDED % size}"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        split = trainer.strategy.device_mesh["tensor_parallel"].size()
        if split > 1:
            raise UserError(
                f"`ModelParallelStrategy` was asked to split matrices over {split} processes "
                f"(`auto` means all of a node); write {SHARDED % size}"
            )


def build_policy(
    module: L.LightningModule, policy: Policy, *, reference: bool, freeze: Callable[[], Any]
) -> None:
    """Build a module's policy: whole on each process, or in shards under `ModelParallelStrategy`.

    Args:
        module: attached to a trainer.
        policy: of the module.
        reference: keep the initial policy scorable.
        freeze: freezes what is not trained.
    """
    mesh, device = module.device_mesh, module.trainer.strategy.root_device
    if mesh is None:
        policy.build(device=device, reference=reference)
        freeze()
        return
    from lightning_mpo.policies.sharding import build_in_shards

    build_in_shards(policy, mesh["data_parallel"], device, reference=reference, freeze=freeze)


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, processes)."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def gather_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all ranks: Lightning writes rank 0's alone."""
    states: list[Any] = [state] * rank_and_world_size()[1]
    if len(states) > 1:
        dist.all_gather_object(states, state)
    return states
