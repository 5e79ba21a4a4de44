"""`lightning-mpo export` and `predict`: from a run with adapters to the completions of what was exported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mpo import cli
from lightning_mpo.export import forms
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.storage import Disk, write_folder
from tests.support.configurations import BASE
from tests.support.exported_runs import EXPORTED, predicted, run_or_export
from tests.support.malicious import MARK, write_malicious

PROMPTS = [{"prompt": "1+2=", "id": 7}, {"prompt": "3+4="}, {"prompt": "5+5=", "id": 9}]
CHECKPOINT = "run/checkpoints/last.ckpt"
PLAIN = ["-c", "run/config.yaml", "-c", "plain.yaml"]
"""The run's configuration without adapters."""


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> Path:
    """A folder with the run of a policy with adapters, which moved away from its base."""
    folder = tmp_path_factory.mktemp("run")
    base = yaml.safe_load(BASE)
    base["model"]["init_args"]["policy"] = {
        "class_path": "CausalPolicy",
        "init_args": {"source": tiny_folder, "lora": {"rank": 4, "alpha": 8}},
    }
    base["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 0.1},
    }
    base["rollout"]["rewards"] = ["Finished"]
    base["trainer"] |= {"max_steps": 2, "log_every_n_steps": 1}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "plain.yaml").write_text("model: {init_args: {policy: {init_args: {lora: null}}}}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-mpo", "fit", "-c", "base.yaml"])
        assert cli.run() == 0
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    for name, value in state["state_dict"].items():
        if "lora_B" in name:
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    torch.save(state, folder / CHECKPOINT)
    return folder


@pytest.fixture
def here(run, tmp_path, monkeypatch) -> Path:
    """A copy of that folder as the working directory."""
    shutil.copytree(run, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def call(monkeypatch) -> Callable[..., int]:
    return run_or_export(monkeypatch)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("adapter", ("--model.init_args.policy.init_args.reference_checkpoint", "gone.ckpt")),
        ("merged", ("--form", "merged", "--dtype", "float32")),
    ],
)
def test_completions_of_a_checkpoint_and_of_what_was_exported_are_the_same(
    here, call, capsys, form, options
):
    data, metrics = (
        ("--data.init_args.path", "prompts.jsonl"),
        (here / "run" / "metrics.csv").read_text(),
    )
    assert call("export", "--checkpoint", CHECKPOINT, "--to", "out", *options) == 0
    said = capsys.readouterr().out
    assert f"written    {form} form" in said
    assert "checked    loaded again and compared: log-probs of" in said
    assert ("warning    merged weights are" in said) == (form == "merged")
    card = (here / "out" / "README.md").read_text()
    assert "2 of 2 prompts x 2 completions; 2 updates" in card
    prompts = ("-c", Path(__file__).parents[2] / "configs" / "data" / "prompts.yaml")
    assert call("predict", "-c", "run/config.yaml", *prompts, *data, "--ckpt_path", CHECKPOINT) == 0
    assert "predicted  3 completions, in " in capsys.readouterr().out
    assert call("predict", *EXPORTED) == 0
    assert predicted() == predicted("run")
    assert (here / "run" / "metrics.csv").read_text() == metrics, (
        "Lightning's logger would begin it afresh"
    )
    assert [(record["prompt"], record.get("id")) for record in predicted()] == [
        ("1+2=", 7),
        ("3+4=", None),
        ("5+5=", 9),
    ]
    assert "reward" not in predicted()[0]
    assert call("predict", *EXPORTED, "--rollout.validation_completions", 2) == 0
    assert [record["prompt"] for record in predicted()][:4] == ["1+2=", "1+2=", "3+4=", "3+4="]


def test_a_checkpoint_that_is_a_folder_gives_the_same(here, call, capsys):
    content = torch.load(CHECKPOINT, weights_only=True)
    shards = {
        "state_dict": content.pop("state_dict"),
        "optimizer_0": content.pop("optimizer_states")[0],
    }
    folder = Path(CHECKPOINT).with_name("folder.ckpt")
    write_folder(shards, content, folder, Disk())
    data = (
        "-c",
        Path(__file__).parents[2] / "configs" / "data" / "prompts.yaml",
        "--data.init_args.path",
        "prompts.jsonl",
    )
    assert call("predict", "-c", "run/config.yaml", *data, "--ckpt_path", CHECKPOINT) == 0
    expected = predicted("run")
    assert call("predict", "-c", "run/config.yaml", *data, "--ckpt_path", folder) == 0
    assert predicted("run") == expected
    begun = ("--model.init_args.policy.init_args.checkpoint", folder)
    assert call("predict", "-c", "run/config.yaml", *data, *begun) == 0
    assert predicted("run") == expected
    assert call("export", "--checkpoint", folder, "--to", "out") == 0
    assert "checked    loaded again and compared" in capsys.readouterr().out
    assert call("predict", *EXPORTED) == 0
    assert predicted() == expected
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert call("export", "--checkpoint", folder, "--to", "again") == 2
    assert (
        f"'run/checkpoints/folder.ckpt' is damaged: '{shard.name}' is truncated"
        in capsys.readouterr().err
    )


def test_completions_are_judged_where_targets_are_named(here, call):
    Path("prompts.jsonl").write_text('{"prompt": "1+2=", "answer": 3}\n')
    options = (
        "--data",
        "PromptFile",
        "--data.init_args.path",
        "prompts.jsonl",
        "--data.init_args.target",
        "answer",
    )
    assert call("predict", "-c", "run/config.yaml", *options, "--ckpt_path", CHECKPOINT) == 0
    (record,) = predicted("run")
    assert record["target"] == "3"
    assert record["reward"] == float(record["finished"])


def test_what_is_not_the_policy_exits_with_one_and_stays(here, call, capsys, monkeypatch):
    write = forms.write_adapter

    def damage(policy, folder):
        write(policy, folder)
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))

    assert call("export", "--checkpoint", CHECKPOINT, "--to", "out") == 0
    earlier = {path: path.read_bytes() for path in (here / "out").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(forms, "write_adapter", damage)
    assert call("export", "--checkpoint", CHECKPOINT, "--to", "out", "--overwrite") == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("lightning-mpo: ")]
    assert len(lines) == 1
    assert (
        f"the export in {here}/.out.part differs from the policy: log-probs differ by up to"
        in lines[0]
    )
    assert lines[0].endswith("; out is unchanged")
    assert "checked" not in said.out
    assert (here / ".out.part" / "adapter_model.safetensors").is_file()
    assert {path: path.read_bytes() for path in (here / "out").iterdir()} == earlier


def test_without_its_data_a_policy_is_compared_on_random_tokens(here, call, capsys):
    assert call(
        "export", "--checkpoint", CHECKPOINT, "--to", "out", "--data", "JsonLines", "--data.init_args.train", "gone.jsonl"
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "note       compared on random tokens, as the run's data cannot be had: there is no file gone.jsonl"
        in said
    )
    assert "checked" in said


def break_checkpoint(path: Path, kind: str) -> None:
    if kind == "malicious":
        write_malicious(path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 255
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("`export` needs --to", ["--checkpoint", CHECKPOINT, "--to="]),
        ("`--checkpoint` 'x.ckpt' does not exist", ["--checkpoint", "x.ckpt"]),
        ("`--checkpoint` 'run' is a folder without .metadata: no checkpoint", ["--checkpoint", "run"]),
        ("`--checkpoint` 'malicious.ckpt' cannot be read as a Lightning checkpoint: it asks to run", "malicious"),
        ("`--checkpoint` 'truncated.ckpt' cannot be read as a Lightning checkpoint", "truncated"),
        ("`--checkpoint` 'tampered.ckpt' is damaged: the checksum of", "tampered"),
        ("the form 'full' is for policies without `policy.lora`", ["--form", "full"]),
        ("argument --form: invalid choice: 'gguf' (choose from", ["--form", "gguf"]),
        ("the form 'adapter' needs adapters", ["--form", "adapter", *PLAIN]),
        ("the form 'merged' needs adapters", ["--form", "merged", *PLAIN]),
        (
            "`--checkpoint` 'run/checkpoints/last.ckpt' holds adapters of rank 4, `policy.lora` has 8",
            ["--model.init_args.policy.init_args.lora.rank", "8"],
        ),
        (
            "`--checkpoint` 'run/checkpoints/last.ckpt' holds adapters of rank 4 and the policy has none",
            PLAIN,
        ),
        ("the target folder 'run' is not empty (it holds 'checkpoints'); name another, or add --overwrite", ["--to", "run"]),
        ("the target folder 'base.yaml/x' cannot be written to", ["--to", "base.yaml/x"]),
        ("no configuration file 'gone.yaml'", ["-c", "gone.yaml"]),
        ("has no argument `tmperature`; did you mean `temperature`?", ["--model.tmperature", "1"]),
    ],
)  # fmt: skip
def test_one_line_before_a_model_is_loaded(here, call, capsys, monkeypatch, said, options):
    monkeypatch.setattr(CausalPolicy, "load_network", lambda self: pytest.fail("loaded"))
    if isinstance(options, str):
        shutil.copy(CHECKPOINT, f"{options}.ckpt")
        break_checkpoint(Path(f"{options}.ckpt"), options)
        options = ["--checkpoint", f"{options}.ckpt"]
    given = {"--checkpoint": CHECKPOINT, "--to": "out"}
    defaults = [
        part for name, value in given.items() if name not in options for part in (name, value)
    ]
    if "--to=" in options:
        defaults, options = [], options[:2]
    before = sorted(here.rglob("*"))
    assert call("export", *defaults, *options) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-mpo: ")
    ]
    assert len(lines) == 1
    assert said in lines[0]
    assert len(lines[0]) < 450
    assert not (here / MARK).exists(), "code in the checkpoint was run"
    assert sorted(here.rglob("*")) == before


def test_another_architecture_is_named(here, call, capsys, tiny_policy):
    other = tiny_policy(hidden_size=64)
    other.network.save_pretrained("other")
    other.tokenizer.save_pretrained("other")
    options = ("--model.init_args.policy.init_args.source", "other")
    assert call("export", "--checkpoint", CHECKPOINT, "--to", "out", *options) == 2
    assert (
        "`--checkpoint` 'run/checkpoints/last.ckpt' does not fit the policy: "
        in capsys.readouterr().err
    )
