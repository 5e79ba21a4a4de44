"""N ranks x 1/N batch gives the gradients of one rank, under DDP and FSDP2; and the strategies that are refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.modules.parallel import check_nodes, check_strategy_options
from tests.support.many_ranks import CASES, gradients

SCRIPT = str(Path(__file__).parents[1] / "support" / "many_ranks.py")
EXITS = """
import atexit, sys
from pathlib import Path
import torch.distributed as dist
atexit.register(lambda: print("at exit", dist.is_initialized()))  # runs after those of later lines
from lightning.pytorch.strategies import ModelParallelStrategy
from tests.support.runs import fit, make_policy
fit(Path(sys.argv[1]), policy=make_policy(), max_steps=1, strategy=ModelParallelStrategy(1, 1))
print("after fit", dist.is_initialized())
"""


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What one process finds, case by case."""
    folder, found = tmp_path_factory.mktemp("one"), {}
    for case in CASES:
        found[case] = gradients(folder, case)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory, request) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes finds under a strategy."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, SCRIPT, str(folder), request.param]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in (0, 1)]


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the gradients of each update, in float64, and what was logged of it."""
    assert len(found["gradients"]) == len(expected["gradients"]) == 4
    for mine, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert mine.keys() == other.keys()
        assert flat(other).norm() > 0
        assert (flat(mine) - flat(other)).norm() < 1e-6 * flat(other).norm()
    for (step, line), (other_step, other_line) in zip(
        found["logged"], expected["logged"], strict=True
    ):
        assert step == other_step
        assert line == pytest.approx(other_line, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("two", ["ddp", "fsdp", "step"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one(one, two, case):
    assert_equal(two[0][case], one[case])
    for mine, other in zip(two[1][case]["gradients"], two[0][case]["gradients"], strict=True):
        assert torch.equal(flat(mine), flat(other))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_have_the_gradients_of_one_process(tmp_path, one, strategy):
    """Two agents of torchrun meet on loopback, each with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    agents = [
        subprocess.Popen(
            [*agent, f"--rdzv-endpoint={place}", "--rdzv-id=two", f"--node-rank={node}", SCRIPT, str(tmp_path), strategy, "2"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(),
        )
        for node in (0, 1)
    ]  # fmt: skip
    errors = [agent.communicate(timeout=600)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors[0][-3000:]
    for rank in (0, 1):
        said = torch.load(tmp_path / f"{strategy}-{rank}.pt")
        for case in said:
            for mine, other in zip(said[case]["gradients"], one[case]["gradients"], strict=True):
                assert (flat(mine) - flat(other)).norm() < 1e-6 * flat(other).norm()


@pytest.mark.slow
def test_connections_are_closed_before_the_interpreter_shuts_down(tmp_path):
    """A thread of Gloo that holds a tensor at that time aborts a finished run."""
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(tmp_path)], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["after fit True", "at exit False"]


def options(data: Any, tensor: Any = 1, devices: Any = 2, nodes: Any = 1) -> dict[str, Any]:
    class Strategy(dict):
        class_path = "lightning.pytorch.strategies.ModelParallelStrategy"

    sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor}
    return {"strategy": Strategy(init_args=sizes), "devices": devices, "num_nodes": nodes}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"strategy": "fsdp", "devices": 4},
            "`trainer.strategy: fsdp` is FSDP1.*data_parallel_size: 4",
        ),
        ({"strategy": "fsdp_cpu_offload"}, "is FSDP1.*data_parallel_size: N"),
        (
            options("auto", "auto"),
            "data_parallel_size auto and tensor_parallel_size auto.*data_parallel_size: 2",
        ),
        (options(2, "auto"), "tensor_parallel_size auto"),
        (options(1, 2), "tensor_parallel_size 2.*tensor_parallel_size: 1"),
        (options(2, devices=8, nodes=2), "there are 16 processes.*data_parallel_size: 16"),
        (options("auto", devices="auto"), "there are N processes"),
    ],
)
def test_a_strategy_that_would_not_train_is_refused_with_what_to_write(given, said):
    with pytest.raises(UserError, match=said):
        check_strategy_options(given)


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "ddp"},
        {},
        options(2),
        options(16, devices=8, nodes=2),
        options(4, devices="auto"),
    ],
)
def test_other_strategies_are_not(given):
    check_strategy_options(given)


def test_several_nodes_need_a_launcher(monkeypatch, capsys):
    trainer = SimpleNamespace(
        num_nodes=2, strategy=SimpleNamespace(cluster_environment=LightningEnvironment())
    )
    variables = {"MASTER_ADDR": "first", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    for name in (*variables, "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match="torchrun or srun; or set MASTER_ADDR, MASTER_PORT, NODE_RANK yourself"
    ):
        check_nodes(trainer)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_nodes(trainer)
    assert (
        capsys.readouterr().out == "nodes      2 of 2: waits at first:29500 until all are there\n"
    )
    monkeypatch.delenv("MASTER_ADDR")
    check_nodes(SimpleNamespace(num_nodes=1, strategy=trainer.strategy))
    check_nodes(
        SimpleNamespace(
            num_nodes=2, strategy=SimpleNamespace(cluster_environment=TorchElasticEnvironment())
        )
    )
