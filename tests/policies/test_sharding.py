"""A policy whose weights are spread over two real processes: loading, rollouts, checkpoints, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_mpo.callbacks import KLTracking
from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.sharding import decoder_layers
from tests.support.adapters import save
from tests.support.runs import distance, fit, make_policy, sgd


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_folder) -> Path:
    """Run the script on two processes and return the folder it wrote to."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).parents[1] / "support" / "two_shards_of_a_policy.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }
    done = subprocess.run(
        [sys.executable, script, str(folder), tiny_folder],
        capture_output=True, text=True, timeout=1500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def said(folder: Path, name: str) -> list[dict]:
    """Return what each process said."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in (0, 1)]


@pytest.mark.slow
def test_one_process_reads_the_model_and_each_holds_half(two):
    ranks = said(two, "load")
    assert [part["calls"] for part in ranks] == [1, 0], "only rank 0 reads the file"
    assert sum(part["own"] for part in ranks) == ranks[0]["all"]
    assert all(abs(part["own"] / part["all"] - 0.5) < 0.01 for part in ranks)
    assert all(part["tied"] and not part["names"] for part in ranks), (
        "ties stay, and the reference is in no state dict"
    )


@pytest.mark.slow
def test_shards_hold_the_pretrained_weights_and_train_as_one_process(tmp_path, two, tiny_folder):
    from transformers import AutoModelForCausalLM

    loaded = torch.load(two / "loaded.pt")
    for name, weight in AutoModelForCausalLM.from_pretrained(tiny_folder).named_parameters():
        assert torch.equal(loaded[f"network.{name}"], weight)
        assert torch.equal(loaded[f"reference_network.{name}"], weight)
    trained, start = (
        torch.load(two / "trained.pt"),
        {n: w for n, w in loaded.items() if n.startswith("network.")},
    )
    assert distance(trained, start) > 1e-4
    for _, line in said(two, "load")[0]["logged"]:
        assert abs(line["kl/old"]) < 0.1


@pytest.mark.slow
def test_a_checkpoint_is_taken_on_top_of_the_source(two):
    for part in said(two, "checkpoint"):
        assert part == {"off": 0.0, "cold": []}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "folder"], ids=["one file", "a part per process"])
def test_resume_within_a_rollout_is_exact(two, kind):
    ranks = said(two, f"resume {kind}")
    for part in ranks:
        assert part["folder"] == (kind == "folder")
        assert part["off"] == 0.0
        assert part["rows"] == part["expected"]
    assert ranks[0]["rows"] != ranks[1]["rows"], (
        "both ranks had the same rows: the test shows nothing"
    )
    assert ranks[0]["logged"] == ranks[0]["whole"][5:]


@pytest.mark.slow
def test_layer_by_layer_is_what_whole_weights_are(two):
    for name in ("dynamic", "everything"):
        whole, layered = said(two, f"{name} True"), said(two, f"{name} False")
        assert whole == layered, name


@pytest.mark.slow
def test_processes_draw_in_different_rounds(two):
    first, second = (part["accounts"] for part in said(two, "dynamic False"))
    assert all(
        a["rollout/rounds"] == b["rollout/rounds"] for a, b in zip(first, second, strict=True)
    )
    missing = [
        (a["rollout/groups_missing"] > 0, b["rollout/groups_missing"] > 0)
        for a, b in zip(first, second, strict=True)
    ]
    assert any(a != b for a, b in missing), (
        "no process ever waited for the other: the test shows nothing"
    )


@pytest.mark.slow
def test_all_that_scores_runs_in_shards(two):
    ranks = said(two, "everything False")
    line = ranks[0]["logged"][-1][1]
    assert {"kl/rollout_mean", "support/overlap", "val/reward", "val/support_length"} <= {
        name for _, logged in ranks[0]["logged"] for name in logged
    }, line
    assert {"initial", "final"} <= ranks[0]["summary"].keys()
    assert sorted(part["predicted"] for part in ranks) == [2, 3], (
        "the processes had different numbers of batches"
    )


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused_on_all_processes(two):
    ranks = said(two, "refuse")
    assert ranks[0] == ranks[1]
    assert "`LlamaModel` has no `layers`" in ranks[0]["layers"]
    assert "`policy.lora`" in ranks[0]["lora"]
    assert "none.ckpt' does not exist" in ranks[0]["checkpoint"]


@pytest.fixture
def alone(monkeypatch):
    """Leave no process group and no variables of one behind."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "gather",
    [pytest.param(True, id="whole", marks=pytest.mark.slow), pytest.param(False, id="layers")],
)
def test_one_process_in_shards_trains_as_without(tmp_path, alone, gather):
    """The weights are DTensors, clipped by value, and activations are recomputed.

    The reference has weights of its own.
    """
    path, other = str(tmp_path / "other.ckpt"), make_policy()
    other.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        other.network.model.embed_tokens.weight.mul_(0.5)
    save(other, path)
    options = {
        "rollout": {"epochs": 2},
        "max_steps": 2,
        "module": {"optimizer": sgd()},
        "callbacks": [KLTracking()],
    }
    options |= {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
    plain = fit(tmp_path, policy=make_policy(reference_checkpoint=path), **options)
    policy = make_policy(reference_checkpoint=path)
    policy.gather_rollouts, policy.gradient_checkpointing = gather, True
    sharded = fit(tmp_path, policy=policy, strategy=ModelParallelStrategy(1, 1), **options)
    assert sharded.module.policy.shards is not None
    assert all(hasattr(weight, "device_mesh") for weight in sharded.module.policy.parameters())
    weights = {
        name: weight.full_tensor()
        for name, weight in sharded.weights.items()
        if "reference" not in name
    }
    expected = {name: weight for name, weight in plain.weights.items() if "reference" not in name}
    assert distance(weights, expected) < 1e-6
    assert [line for _, line in sharded.record.without_clocks()] == [
        pytest.approx(line, rel=1e-3, abs=1e-5) for _, line in plain.record.without_clocks()
    ]


def test_layers_are_found_by_list_or_by_class():
    class Block(nn.Module):
        pass

    class Decoder(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList(Block() for _ in range(3))

    decoder = Decoder()
    assert decoder_layers(decoder) == list(decoder.h)
    decoder.layers = nn.ModuleList([nn.Linear(1, 1)])
    assert decoder_layers(decoder) == list(decoder.layers)
    with pytest.raises(UserError, match="`Sequential` has no `layers`"):
        decoder_layers(nn.Sequential(nn.Linear(1, 1)))


def test_the_reference_is_in_no_state_dict(tmp_path):
    run = fit(tmp_path, callbacks=[KLTracking()], max_steps=1, module={"optimizer": sgd()})
    assert run.module.policy.reference_network is not None
    assert not any("reference" in name for name in run.module.policy.state_dict())
    assert any(name.startswith("network.") for name in run.module.policy.state_dict())


def test_an_outline_has_the_weights_that_are_built(tiny_folder):
    """By name and shape, on the meta device."""
    from lightning_mpo.policies import ParallelHeads, SeparateCritic

    built, outline = (
        CausalPolicy(
            tiny_folder, mtp=ParallelHeads(2, own_unembedding=True), critic=SeparateCritic(8)
        )
        for _ in range(2)
    )
    built.build(device=torch.device("cpu"), reference=False)
    outline.outline()
    assert all(weight.is_meta for weight in outline.parameters())
    shapes = [
        {n: (w.shape, w.requires_grad) for n, w in p.named_parameters()} for p in (built, outline)
    ]
    assert shapes[0] == shapes[1]
