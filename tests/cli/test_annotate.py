"""`lightning-mpo annotate`: forth with a tiny model, and back byte for byte."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_mpo.cli import export
from lightning_mpo.cli.main import main
from lightning_mpo.data.code_files import read_paths
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import TinyPolicy
from tests.support.code_corpus import CHARACTERS, tiny, write_corpus

SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 1024, "characters": CHARACTERS}
RUN = {
    "include": ["ra3_e_step", "code_lines"],
    "model": {
        "init_args": {
            "policy": {"class_path": "TinyPolicy", "init_args": SMALL},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        }
    },
    "data": {"init_args": {"paths": ["code"], "max_files": None, "validation_share": 0.3,
                           "split_seed": 1, "max_prompt_tokens": 80, "lines_per_file": 2}},
    "rollout": {"prompts": 2, "completions": 4, "max_new_tokens": 12},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "default_root_dir": "run",
                "num_sanity_val_steps": 0, "limit_val_batches": 0, "enable_progress_bar": False,
                "enable_model_summary": False, "logger": False,
                "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                               "init_args": {"dirpath": "run", "save_last": True}}]},
}  # fmt: skip


@pytest.mark.slow
def test_an_e_step_annotates_and_strips(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "code", 6)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    assert main(["fit", "-c", "run.yaml"]) == 0
    options = ["-c", "run.yaml", "--checkpoint", "run/last.ckpt", "--to", "out"]
    assert main(["annotate", *options]) == 0
    assert "annotated  11 files (copied as they are: " in capfd.readouterr().out
    listed = json.loads((tmp_path / "out" / "thoughts.json").read_text())["files"]
    for name in (path for path in listed if "file_" in path):
        ast.parse((tmp_path / "out" / name).read_text())
    assert main(["annotate", "--strip", "out", "--to", "back"]) == 0
    for name in listed:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "code" / name).read_bytes()
    # the same thoughts again, with batches of another size
    assert main(["annotate", *options[:-1], "again", "--batch", "3"]) == 0
    assert (tmp_path / "again" / "thoughts.json").read_bytes() == (
        tmp_path / "out" / "thoughts.json"
    ).read_bytes()


def test_a_support_that_ranks_with_the_reference_has_that_of_the_run(monkeypatch):
    def reference(from_reference, used=True, **options):
        objective = SimpleNamespace(support=TopK(4, from_reference=from_reference))
        module = SimpleNamespace(policy=TinyPolicy(CHARACTERS, **options), objective=objective)
        monkeypatch.setattr(export, "Reader", lambda **given: SimpleNamespace(model=module))
        _, policy = export.read_run("annotate", [], Path("new.ckpt"), [], reference=used)
        assert policy.checkpoint == "new.ckpt"
        return policy.reference_checkpoint

    start, other = {"checkpoint": "start.ckpt"}, {"reference_checkpoint": "other.ckpt"}
    assert reference(True) == "source"
    assert reference(True, **start) == "start.ckpt"
    assert reference(True, **start, **other) == "other.ckpt"
    # not needed: the file may be gone
    assert reference(False, **start, **other) is None
    assert reference(True, used=False, **start, **other) is None


@pytest.mark.slow
def test_200_files_of_the_standard_library_come_back_byte_for_byte(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    policy = tiny()
    torch.manual_seed(0)
    policy.build(device=torch.device("cpu"), reference=False)
    state = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 0}, tmp_path / "last.ckpt")
    # few lines; one of 96 characters ends a thought, so about a fifth of them ends in time
    sizes = {"min_characters": 60, "max_line_tokens": 120, "max_prompt_tokens": 120}
    data = {"paths": ["stdlib"], "max_files": 200} | sizes
    rollout = {"max_new_tokens": 24}
    run = RUN | {"data": {"init_args": RUN["data"]["init_args"] | data}, "rollout": rollout}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    options = ["-c", "run.yaml", "--checkpoint", "last.ckpt", "--batch", "128"]
    assert main(["annotate", *options, "--to", "out"]) == 0
    printed = capfd.readouterr().out
    assert int(re.search(r"annotated .* ([\d,]+) thoughts", printed)[1].replace(",", "")) > 100
    assert main(["annotate", "--strip", "out", "--to", "back"]) == 0
    read = read_paths(["stdlib"], 200)
    assert sum(not isinstance(file, str) for _, _, file in read) == 200
    for path, name, _ in read:
        assert (tmp_path / "back" / name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`annotate` needs --to FOLDER, which is empty or new"),
        (
            ["--to", "x"],
            "`annotate` needs -c CONFIG and --checkpoint FILE of an E-step, or --strip",
        ),
        (["--strip", ".", "--to", "x", "-c", "a"], "`annotate --strip FOLDER` takes --to alone"),
        (["--strip", ".", "--to", "x"], "'.' has no thoughts.json; give a folder that `annotate`"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["annotate", *arguments]) == 2
    assert f"lightning-mpo: {message}" in capfd.readouterr().err
