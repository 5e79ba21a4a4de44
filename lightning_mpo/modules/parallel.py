"""Builds a policy over processes, and refuses strategies that would not train it correctly."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy

SHARDED_STRATEGY = (
    "`strategy: {class_path: ModelParallelStrategy, init_args: {data_parallel_size: %s, "
    "tensor_parallel_size: 1}}`"
)
"""The configuration that messages propose; `%s` is the number of processes."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables from which Lightning reads the rank of a process."""


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
    count_known = str(devices).lstrip("+").isdigit() and str(nodes).isdigit()
    processes = str(int(devices) * int(nodes)) if count_known else "N"
    # strategies that are refused
    if name.lower().startswith("fsdp"):
        raise UserError(
            f"`trainer.strategy: {name}` is FSDP1, which is not supported; write "
            f"{SHARDED_STRATEGY % processes}"
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
    data_size = options.get("data_parallel_size", "auto")
    tensor_size = options.get("tensor_parallel_size", "auto")
    if (
        tensor_size != 1
        or data_size == "auto"
        or (count_known and int(data_size) != int(processes))
    ):
        raise UserError(
            f"`ModelParallelStrategy` has data_parallel_size {data_size} and tensor_parallel_size "
            f"{tensor_size}, and there are {processes} processes (`trainer.devices` x "
            f"`trainer.num_nodes`); write {SHARDED_STRATEGY % processes}"
        )


def check_alone(trainer: L.Trainer) -> None:
    """Refuse a single process whose environment gives it a rank above 0: it would log no metrics.

    Raises:
        UserError: an environment variable gives this process a rank above 0.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    variable = next(
        (name for name in RANK_VARIABLES if rank and os.environ.get(name) == str(rank)), None
    )
    if trainer.world_size == 1 and variable is not None:
        raise UserError(
            f"the environment variable {variable} is {rank}, which makes this one of several "
            "processes, but `trainer.devices` and `trainer.strategy` make it the only one: unset "
            f"{variable}, or give `trainer.strategy: ddp` and the number of devices"
        )


def check_nodes(trainer: L.Trainer) -> None:
    """Refuse several nodes without a launcher; the first one would wait for half an hour.

    Raises:
        UserError: no launcher started this process, and an environment variable with the address of
            the first node or the rank of this node is missing.
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
    """Refuse strategies that would not train the policy correctly.

    Raises:
        UserError: FSDP1, or tensor parallelism.
    """
    processes = trainer.world_size
    if isinstance(trainer.strategy, FSDPStrategy):
        raise UserError(
            "`trainer.strategy: fsdp` is FSDP1, which is not supported; write "
            f"{SHARDED_STRATEGY % processes}"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        tensor_size = trainer.strategy.device_mesh["tensor_parallel"].size()
        if tensor_size > 1:
            raise UserError(
                f"`ModelParallelStrategy` was asked to split matrices over {tensor_size} processes "
                f"(`auto` means all of a node); write {SHARDED_STRATEGY % processes}"
            )


def build_policy(
    module: L.LightningModule, policy: Policy, *, reference: bool, freeze: Callable[[], Any]
) -> None:
    """Build a module's policy: whole on each process, or in shards under `ModelParallelStrategy`.

    Args:
        module: attached to a trainer.
        policy: of the module.
        reference: keep the initial policy as the reference.
        freeze: freezes weights that are not trained.
    """
    atexit.unregister(close_process_groups)  # once, however many policies are built
    atexit.register(close_process_groups)
    mesh, device = module.device_mesh, module.trainer.strategy.root_device
    if mesh is None:
        policy.build(device=device, reference=reference)
        freeze()
        return
    from lightning_mpo.policies.sharding import build_in_shards

    build_in_shards(policy, mesh["data_parallel"], device, reference=reference, freeze=freeze)


def close_process_groups() -> None:
    """Close the connections between processes before the interpreter shuts down.

    A thread of Gloo that still holds a tensor while Python finalizes aborts the process, which turns
    the exit code of a finished run into 134. Lightning closes the connections of NCCL only.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, processes)."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def gather_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all ranks, as Lightning writes only the state of rank 0."""
    states: list[Any] = [state] * rank_and_world_size()[1]
    if len(states) > 1:
        dist.all_gather_object(states, state)
    return states


def state_of_rank(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of this rank out of those that `gather_ranks` returned.

    Raises:
        UserError: another number of processes saved them.
    """
    rank, world = rank_and_world_size()
    if len(states) != world:
        raise UserError(
            f"the checkpoint was saved by {len(states)} processes and cannot be resumed by {world}"
        )
    return states[rank]
