"""The verb `plan`: its table, what fits, what it refuses; and three real configurations against a measured step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_mpo.cli import plan as command
from lightning_mpo.policies.precision import computes_natively
from tests.support.configurations import BASE

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return "base.yaml"


def test_weights_gradients_and_state_are_those_of_the_model(base, capsys):
    assert command.main(["-c", base]) == 0
    said = capsys.readouterr().out
    from lightning_mpo.policies import TinyPolicy

    policy = TinyPolicy(hidden_size=32, layers=1, heads=2)
    numbers = sum(weight.numel() for weight in policy.load_network().parameters())
    rows = {
        line.split("  ")[0]: [float(x) for x in re.findall(r"[\d.]+", line)]
        for line in said.splitlines()[2:]
    }
    assert rows["base weights"] == [round(4 * numbers / 2**20, 1)] * 4
    assert rows["optimiser state"] == [round(8 * numbers / 2**20, 1)] * 4
    assert rows["gradients"][-1] == round(4 * numbers / 2**20, 1)


@pytest.mark.parametrize(
    "kind", ["ParallelHeads", "SequentialHeads", "MedusaHeads", "ValueHead", "SeparateCritic"]
)
def test_heads_and_critic_are_counted_with_their_gradients_and_state(base, kind):
    from lightning_mpo import policies
    from lightning_mpo.plan.predict import Planner

    part = "mtp" if kind.endswith("Heads") else "critic"
    plain, more = (
        Planner(*command.build(["-c", base, *options]))
        for options in ([], [f"--model.init_args.policy.init_args.{part}", kind])
    )
    policy = policies.TinyPolicy(
        hidden_size=32, layers=1, heads=2, **{part: getattr(policies, kind)()}
    )
    policy.build(device=torch.device("cpu"), reference=False)
    own = sum(weight.numel() * 4 for weight in getattr(policy, part).parameters())
    assert own > 0
    before, after = plain.predict().phases, more.predict().phases
    for phase in before:
        gained = {name: size - before[phase].get(name, 0) for name, size in after[phase].items()}
        gradients = own if phase in ("update", "optimiser") else 0
        assert gained.pop("heads" if part == "mtp" else "critic") == own
        assert gained.pop("optimiser state") == 2 * own
        assert gained.pop("gradients", 0) == gradients
        assert not any(gained.values())
    assert more.notes() == [f"not counted: activations of `policy.{part}`"]


def test_what_fits_is_said(base, capsys):
    assert command.main(["-c", base, "--gpu-gib", "8"]) == 0
    said = capsys.readouterr().out
    assert "fits: trainer.accumulate_grad_batches 1 (micro-batches of 4 rows)" in said
    assert command.main(["-c", base, "--gpu-gib", "0.6001"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_a_check_that_the_machine_cannot_hold_is_refused(base, capsys, monkeypatch):
    monkeypatch.setattr(
        command.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}[name]
    )
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: pytest.fail("it ran"))
    assert command.main(["-c", base, "--check"]) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-mpo: ")
    ]
    assert (
        "`--check` runs two rollouts, for which 0.0 GiB are predicted, and this machine has 0.0 GiB"
        in line
    )


def test_spare_room_of_the_cache_counts_on_a_gpu_alone(base):
    from lightning_mpo.plan.predict import Planner
    from lightning_mpo.sampling.cache import ROOM

    planner = Planner(*command.build(["-c", base]))
    sizes = replace(planner.sizes, prompt=10, response=ROOM + 2, together=3)
    item = 4
    per_token = 2 * 3 * 2 * (32 // 2) * item  # keys and values, sequences, heads, their size
    layers = 1 + 1  # the layer that grows is there twice
    assert planner.cache(sizes) == layers * per_token * (10 + ROOM + 2)
    planner.gpu = True
    assert planner.cache(sizes) == layers * per_token * (10 + 2 * (ROOM + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a configuration"),
        (["-c", "base.yaml", "--gpu-gib", "0.1"], "`--gpu-gib` must be above"),
        (["-c", "base.yaml", "--gpu-gib", "big"], "--gpu-gib: invalid float value: 'big'"),
        (["-c", "missing.yaml"], "no configuration file"),
        (["-c", "base.yaml", "--rollout.promts", "3"], "no option `rollout.promts`"),
        (
            ["-c", "base.yaml", "--model.temperature", "-1"],
            "`model.temperature` must be positive, got -1.0",
        ),
        (
            ["-c", "base.yaml", "--trainer.max_steps", "${nope}"],
            "`trainer.max_steps`: Interpolation key 'nope'",
        ),
    ],
)
def test_mistakes_are_one_line(base, capsys, arguments, message):
    assert command.main(arguments) == 2
    told = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")
    ]
    assert len(told) == 1
    assert told[0].startswith("lightning-mpo: ")
    assert message in told[0]


CASES = {
    "full": ["-c", "full.yaml"],
    "lora": [],
    "qlora": ["-c", str(CONFIGS / "hardware" / "qlora_8gb.yaml")],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_measured_step_of_smollm2_is_within_15_percent(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    body = (
        "There are {a} red birds and {b} blue birds sitting on the long fence of farm number {a}."
    )
    rows = [
        {
            "ID": str(a),
            "Body": body.format(a=a, b=7),
            "Question": "How many birds are there?",
            "Answer": a + 7.0,
        }
        for a in range(40)
    ]
    (tmp_path / "SVAMP.json").write_text(json.dumps(rows))
    small: dict[str, Any] = {
        "rollout": {"prompts": 4, "max_new_tokens": 32},
        "trainer": {"accumulate_grad_batches": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    full = {"model": {"init_args": {"policy": {"init_args": {"lora": None, "dtype": "float32"}}}}}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(full))
    if case == "qlora" or (
        case == "lora" and not computes_natively(torch.bfloat16, torch.device("cpu"))
    ):
        own = {"dtype": "float32"} | (
            {"quantization": {"compute_dtype": "float32"}} if case == "qlora" else {}
        )
        small["model"] = {"init_args": {"policy": {"init_args": own}}}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    experiment = ["-c", str(CONFIGS / "experiment" / "smollm2_svamp.yaml")]
    options = [*CASES[case], "-c", "small.yaml", "--data.init_args.path", "SVAMP.json", "--check"]
    code = command.main([*experiment, *options])
    said = capsys.readouterr()
    print(said.out)
    assert code == 0, said.out + said.err


def test_a_plan_needs_no_checkpoint_that_a_warm_up_has_yet_to_make(base, capsys):
    assert command.main(["-c", "quickstart", "-c", "grpo"]) == 0
    assert "base weights" in capsys.readouterr().out
    assert (
        command.main(["-c", base, "--model.init_args.policy.init_args.checkpoint", "none.ckpt"])
        == 2
    )
    assert "`policy.checkpoint` 'none.ckpt' does not exist" in capsys.readouterr().err
