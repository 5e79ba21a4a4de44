"""Every verb, and every callback that takes one, with a masked policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mpo import cli
from lightning_mpo.cli import plan
from tests.support.exported_runs import EXPORTED, predicted, run_or_export
from tests.support.masked_runs import masked_configuration

CALLBACKS: dict[str, dict[str, Any]] = {
    "KLTracking": {"every": 1},
    "ReferenceUpdate": {"every": 1},
    "Watchdog": {},
    "Samples": {},
    "Throughput": {},
    "MemoryAccounting": {},
    "Heartbeat": {},
    "PromptOrder": {},
    "Report": {},
    "Export": {},
}
LAST = "run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with a run of two updates and all callbacks."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "base.yaml").write_text(masked_configuration(**CALLBACKS))
    (folder / "prompts.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "12+34="}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning-mpo", "fit", "-c", "base.yaml"])
        assert cli.run() == 0
    return folder


@pytest.fixture
def here(run, tmp_path, monkeypatch) -> Path:
    """A copy of that folder as the working directory."""
    shutil.copytree(run, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_callbacks_measure_and_write(run):
    header = (run / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    metrics = {"throughput/rollout_tokens_per_s", "memory/peak_mib", "kl/rollout_mean"}
    assert metrics <= set(header)
    names = {path.name for path in (run / "run").rglob("*") if path.is_file()}
    assert {"summary.json", "memory.json", "rollouts.jsonl", "prompts.jsonl"} <= names
    usage = json.loads((run / "run" / "export" / "lightning_mpo.json").read_text())
    assert usage["masked"]["block"] == 4
    card = (run / "run" / "export" / "README.md").read_text()
    assert "likelihood `Denoising" in card


def test_an_export_completes_prompts_as_its_checkpoint_does(here, monkeypatch, capsys):
    call = run_or_export(monkeypatch)
    assert call("export", "--checkpoint", LAST, "--to", "out") == 0
    assert "checked    loaded again and compared: log-probs of" in capsys.readouterr().out
    prompts = ("-c", "data/prompts", "--data.init_args.path", "prompts.jsonl")
    assert call("predict", "-c", "run/config.yaml", *prompts, "--ckpt_path", LAST) == 0
    assert call("predict", *EXPORTED, "--show-order") == 0
    assert predicted() == predicted("run")
    assert call("predict", *EXPORTED, "--max_new_tokens", "6") == 2
    assert "(6) must be a multiple of `DiffusionSampler.block` (4)" in capsys.readouterr().err


def test_validate_and_plan_take_a_masked_policy(here, monkeypatch, capsys):
    call = run_or_export(monkeypatch)
    validate = ("-c", "run/config.yaml", "--ckpt_path", LAST, "--trainer.limit_val_batches", "1")
    assert call("validate", *validate) == 0
    assert "val/truncated" in capsys.readouterr().out
    assert plan.main(["-c", "base.yaml", "--gpu-gib", "8"]) == 0
    said = capsys.readouterr().out
    assert "8 sequences of 4 + 8 tokens, each in 2 noised copies, micro-batches of 16 rows" in said
    assert "KV cache" not in said
    assert "DiffusionSampler(batch_size: 8)" in said


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (
            ["--model.init_args.objective.likelihood.init_args.steps", "3"],
            2,
            "saved with the objective likelihood Denoising(steps=2",
        ),
        (
            ["--rollout.sampler.init_args.tokens_per_step", "1"],
            0,
            "rollout.sampler.tokens_per_step was 2 and is 1",
        ),
        (["--rollout.sampler.init_args.block", "8"], 0, "rollout.sampler.block was 4 and is 8"),
    ],
)
def test_a_changed_likelihood_is_refused_and_a_changed_sampler_printed(
    here, monkeypatch, capsys, caplog, options, code, said
):
    call = run_or_export(monkeypatch)
    more = ("-c", "base.yaml", "--ckpt_path", LAST, "--trainer.max_steps", "3")
    assert call("fit", *more, "--trainer.callbacks", "[]", *options) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err + caplog.text


@pytest.mark.slow
def test_a_measured_step_of_whole_responses_is_within_15_percent(tmp_path, monkeypatch, capsys):
    """A BERT whose activations dominate, four copies of each row, two micro-batches."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(masked_configuration())
    arguments = config["model"]["init_args"]
    arguments["policy"]["init_args"] = {"hidden_size": 384, "layers": 6, "heads": 6}
    likelihood = {"class_path": "CoupledElbo", "init_args": {"pairs": 2}}
    arguments["objective"] |= {
        "actions": "SequenceActions",
        "reduction": "SequenceMean",
        "likelihood": likelihood,
    }
    sampler = {"class_path": "DiffusionSampler", "init_args": {"block": 32, "tokens_per_step": 16}}
    config["rollout"] |= {"completions": 8, "max_new_tokens": 128, "sampler": sampler}
    config["rollout"]["parity_gate"] = False
    config["trainer"] |= {"callbacks": [], "accumulate_grad_batches": 2}
    Path("large.yaml").write_text(yaml.safe_dump(config))
    code = plan.main(["-c", "large.yaml", "--check"])
    said = capsys.readouterr()
    print(said.out)
    assert code == 0, said.out + said.err
