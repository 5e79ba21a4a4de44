"""A stage of a list whose reference is the checkpoint of another stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_mpo import cli
from lightning_mpo.cli import stages

ENTRIES = [
    {"name": "think", "config": "e.yaml", "from": "m"},
    {"name": "e", "config": "e.yaml", "from": "think", "reference": ["m"]},
    {"name": "m", "config": "m.yaml", "from": "m"},
]
NOTES = {"name": "notes", "config": "e.yaml", "verb": "annotate", "from": "e"}


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Write a list of stages; return the words of its command line."""
    monkeypatch.chdir(tmp_path)

    def write(entries):
        for name in ("e", "m"):
            Path(f"{name}.yaml").write_text("{}")
        content = {"folder": "run", "rounds": 2, "stages": entries}
        Path("list.yaml").write_text(yaml.safe_dump(content))
        return ["-c", "list.yaml"]

    return write


def test_a_reference_is_the_checkpoint_of_the_stage_that_ran_last(listed):
    plan = stages.find_list(listed(ENTRIES))
    checkpoints = {entry["name"]: Path("last.ckpt") for entry in ENTRIES}
    words = [entry.words for _, entry in plan.entries(checkpoints, 2)]

    def values(option):
        return [line[line.index(option) + 1] if option in line else None for line in words]

    first_m = "run/round_1/m/last.ckpt"
    assert values(stages.REFERENCE_CHECKPOINT) == [None, None, None, None, first_m, None]
    thinks = [f"run/round_{n}/think/last.ckpt" for n in (1, 2)]
    assert values(stages.CHECKPOINT) == [None, thinks[0], None, first_m, thinks[1], first_m]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("notes", "stage 'e' has the reference 'notes', which writes no checkpoint"),
        ("other", "stage 'e' names 'other', which is no stage; there are think, e, m, notes"),
        (3, "stage 'e' names 3, which is no stage"),
    ],
)
def test_a_reference_that_is_no_stage_with_a_checkpoint_is_refused(
    listed, reference, message, capsys
):
    entries = [*ENTRIES[:1], ENTRIES[1] | {"reference": reference}, *ENTRIES[2:], NOTES]
    assert cli.run(["fit", *listed(entries)]) == 2
    assert message in capsys.readouterr().err
