"""What can be checked of images, compose file and SLURM script without building or starting them."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lightning_mpo import cli

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_copies_what_is_there_and_both_folders_of_the_package(name):
    lines = (DOCKER / f"{name}.Dockerfile").read_text().splitlines()
    copied = [
        part for line in lines if line.startswith("COPY ") for part in shlex.split(line)[1:-1]
    ]
    assert {"lightning_mpo", "callbacks", "configs", "pyproject.toml", "constraints.txt"} <= set(
        copied
    )
    assert all((ROOT / path).exists() for path in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)
    assert any("whl/cpu" in line for line in lines) == (name == "cpu")


def test_the_nodes_of_the_compose_file_run_one_command_that_the_command_line_takes(capsys):
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["node0"]["command"] == services["node1"]["command"]
    command = shlex.split(services["node0"]["command"])
    agent, rest = command[: command.index("-m")], command[command.index("-m") :]
    assert agent[0] == "torchrun"
    assert "--rdzv-endpoint=node0:29500" in agent
    assert services["node0"]["hostname"] == "node0"
    assert rest[:2] == ["-m", "lightning_mpo"]
    with contextlib.chdir(ROOT), pytest.raises(SystemExit, match="^0?$"):
        cli.run([*rest[2:], "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    processes = int(next(part for part in agent if part.startswith("--nnodes=")).split("=")[1])
    assert trainer["num_nodes"] == processes
    assert trainer["devices"] in (1, "1")
    assert trainer["strategy"]["init_args"]["data_parallel_size"] == processes
    assert trainer["callbacks"][-1]["class_path"].endswith("Heartbeat")


def test_the_warm_up_is_there_before_the_nodes():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for node in ("node0", "node1"):
        assert (
            services[node]["depends_on"]["warmup"]["condition"] == "service_completed_successfully"
        )
    needed = yaml.safe_load((ROOT / "configs/experiment/quickstart.yaml").read_text())["warmup"]
    assert f"configs/experiment/{needed}" in services["warmup"]["command"]


def test_the_slurm_script_starts_as_many_tasks_as_the_hardware_file_names():
    script = (DOCKER / "fsdp.slurm").read_text()
    subprocess.run(["bash", "-n", str(DOCKER / "fsdp.slurm")], check=True)
    asked = {
        name: int(value)
        for name, value in re.findall(r"#SBATCH --(nodes|ntasks-per-node)=(\d+)", script)
    }
    trainer = yaml.safe_load((ROOT / "configs/hardware/fsdp_multinode.yaml").read_text())["trainer"]
    assert asked == {"nodes": trainer["num_nodes"], "ntasks-per-node": trainer["devices"]}
    assert (
        trainer["strategy"]["init_args"]["data_parallel_size"]
        == trainer["num_nodes"] * trainer["devices"]
    )
    assert "--kill-on-bad-exit=1" in script
    assert {"#SBATCH --requeue", "#SBATCH --signal=SIGUSR1@600"} <= set(script.splitlines()), (
        "what Preemption waits for"
    )
    assert "--ckpt_path last" in script, "a job that was queued again goes on"
