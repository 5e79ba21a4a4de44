"""The commands of a list of stages: rounds, checkpoints to start from, and what is not there yet."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from lightning_mpo import cli
from lightning_mpo.cli import stages
from lightning_mpo.cli.stage_metrics import write_metrics
from tests.support.code_corpus import write_corpus

FROM = "--model.init_args.policy.init_args.checkpoint"


def commands(folder: Path, entries: list[dict]) -> tuple[list[tuple[str, ...]], list[str | None]]:
    """Return the command of each stage in two rounds, and the checkpoint that it starts from."""
    for name in "em":
        (folder / f"{name}.yaml").write_text("{}")
    content = {"folder": "run", "rounds": 2, "stages": entries}
    (folder / "list.yaml").write_text(yaml.safe_dump(content))
    plan = stages.find_list(["-c", str(folder / "list.yaml")])
    checkpoints = {entry["name"]: Path("last.ckpt") for entry in entries}
    words = [entry.words for _, entry in plan.entries(checkpoints, 2)]
    return words, [line[line.index(FROM) + 1] if FROM in line else None for line in words]


def test_stages_of_the_first_and_the_last_round(tmp_path):
    entries = [
        {"name": "base", "config": "m.yaml", "when": "first"},
        {"name": "e", "config": "e.yaml", "from": ["base", "m"]},
        {"name": "m", "config": "m.yaml", "from": "e"},
        {"name": "rl", "config": "e.yaml", "from": "m", "when": "last"},
    ]
    words, starts = commands(tmp_path, entries)
    assert list(
        zip([line[-1].removeprefix("run/round_") for line in words], starts, strict=True)
    ) == [
        ("1/base", None),
        ("1/e", "run/round_1/base/last.ckpt"),
        ("1/m", "run/round_1/e/last.ckpt"),
        ("2/e", "run/round_1/m/last.ckpt"),
        ("2/m", "run/round_2/e/last.ckpt"),
        ("2/rl", "run/round_2/m/last.ckpt"),
    ]


def test_a_stage_starts_from_the_one_that_ran_last_before_it(tmp_path):
    entries = [
        {"name": "a", "config": "m.yaml"},
        {"name": "b", "config": "e.yaml", "from": ["a", "c"]},
        {"name": "c", "config": "m.yaml", "from": ["b", "c"]},
    ]
    _, starts = commands(tmp_path, entries)
    assert starts[1:3] == ["run/round_1/a/last.ckpt", "run/round_1/b/last.ckpt"]
    assert starts[4:] == ["run/round_2/a/last.ckpt", "run/round_2/b/last.ckpt"]


SAVE = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: "${trainer.default_root_dir}/inner", save_last: true}
"""
STAGES = [
    {"name": "first", "options": ["--data.paths=[code]"]},
    {"name": "second", "from": "first", "options": ["--data.paths=[${stages.first}]"]},
    {"name": "third", "from": "second", "reference": "first", "options": ["--data.paths=[code]"]},
]


def test_commands_name_checkpoints_and_files_that_are_not_there_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("code"))
    Path("save.yaml").write_text(SAVE)
    entries = [{"config": "ra3_tiny_e_step_stage", **stage} for stage in STAGES]
    Path("list.yaml").write_text(yaml.safe_dump({"folder": "run", "stages": entries}))
    assert cli.run(["fit", "-c", "list.yaml", "-c", "save.yaml", "--print_config"]) == 0
    second, third = map(shlex.split, capsys.readouterr().out.splitlines()[-2:])
    last = "run/round_1/{}/inner/last.ckpt"
    assert second[second.index(FROM) + 1] == last.format("first")
    assert "--data.paths=[run/round_1/first]" in second
    assert third[third.index(FROM) + 1] == last.format("second")
    assert third[third.index(stages.REFERENCE_CHECKPOINT) + 1] == last.format("first")
    assert not Path("run").exists()


def test_metrics_have_the_round_and_the_stage(tmp_path):
    tables = {
        "round_1/a": "step,x\n0,1\n1,\n",
        "round_1/b": "step,y\n0,5\n",
        "round_2/a": "step,x\n0,2\n",
    }
    for name, text in tables.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.csv").write_text(text)
    names = ["round_1/a", "round_1/none", "round_1/b", "round_2/a", "round_2/b"]
    write_metrics(tmp_path, names)
    expected = "round,stage,step,x,y\n1,a,0,1,\n1,a,1,,\n1,b,0,,5\n2,a,0,2,\n"
    assert (tmp_path / "metrics.csv").read_text() == expected
    write_metrics(tmp_path / "none", names)
    assert not (tmp_path / "none").exists()
