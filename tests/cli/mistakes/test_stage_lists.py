"""Mistakes in the stages of a list end in one line before the first stage runs."""

from __future__ import annotations

import pytest
import yaml

from tests.support.configurations import BASE
from tests.support.mistakes import Case, check_message

ROOT = "${trainer.default_root_dir}"
SAVE = f"{{class_path: ModelCheckpoint, init_args: {{dirpath: '{ROOT}', save_last: true}}}}"
LAID = f"trainer: {{logger: false, callbacks: [{SAVE}]}}"
"""Lays a stage's checkpoints into its folder, over the base of the table."""


def stages(message: str, *entries: dict, laid: str = LAID) -> Case:
    """Return a mistake of a list; a file is laid over each of its stages."""
    listed = yaml.safe_dump({"folder": "run", "stages": [*entries]})
    files = {"list.yaml": listed, "a.yaml": BASE, "laid.yaml": laid}
    return Case(message, ["-c", "list.yaml", "-c", "laid.yaml"], files)


RIGHT = {"name": "right", "config": "a.yaml"}
CASES = {
    "an option of the second stage": stages(
        "stage 'wrong': no option `trainer.max_step`…did you mean `trainer.max_steps`",
        RIGHT,
        {"name": "wrong", "config": "a.yaml", "options": ["--trainer.max_step", "3"]},
    ),
    "sizes of the second stage": stages(
        "stage 'wrong': `rollout.minibatches` must be at least 1, got 0",
        RIGHT,
        {"name": "wrong", "config": "a.yaml", "options": ["--rollout.minibatches", "0"]},
    ),
    "a stage that saves elsewhere": stages(
        "stage 'right': it writes into '…run/checkpoints', not into its folder "
        "'run/round_1/right': write `dirpath: ${trainer.default_root_dir}`",
        RIGHT,
        laid="trainer: {logger: false}",
    ),
    "a stage that logs elsewhere": stages(
        "stage 'right': it writes into 'run', not into its folder 'run/round_1/right'",
        RIGHT,
        laid=f"trainer: {{callbacks: [{SAVE}]}}",
    ),
    "a stage that does not save its end": stages(
        "stage 'right': it writes no `last.ckpt`, which the list of stages needs",
        RIGHT,
        laid="trainer: {logger: false, callbacks: []}",
    ),
    "thoughts of a run that is no E-step": stages(
        "stage 'notes': `annotate` needs the configuration of an E-step",
        RIGHT,
        {"name": "notes", "config": "a.yaml", "verb": "annotate", "from": "right"},
    ),
    "an option of annotate": stages(
        "stage 'notes': `--batch` must be at least 1, got 0",
        RIGHT,
        {"name": "notes", "config": "a.yaml", "verb": "annotate", "from": "right", "options": ["--batch=0"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message(name, tmp_path):
    check_message(CASES[name], tmp_path)
