"""`lightning-mpo annotate`: forth with a tiny model, and back byte for byte."""

from __future__ import annotations

import ast
import json

import pytest
import yaml

from lightning_mpo.cli.main import main
from tests.support.code_corpus import CHARACTERS, write_corpus

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
    # the same thoughts again, and other ones with another seed
    assert main(["annotate", *options[:-1], "again"]) == 0
    assert (tmp_path / "again" / "thoughts.json").read_bytes() == (
        tmp_path / "out" / "thoughts.json"
    ).read_bytes()


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
