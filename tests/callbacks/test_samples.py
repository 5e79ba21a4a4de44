"""Samples: what is written, and the table."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.callbacks import Samples
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback
from tests.support.runs import fit


class Keep(RolloutCallback):
    def __init__(self):
        self.events = []

    def on_rollout_end(self, trainer, module, event):
        self.events.append(event)


def test_every_so_many_rollouts_completions_are_appended(tmp_path, capsys):
    keep = Keep()
    fit(
        tmp_path,
        callbacks=[Samples(every=2, count=3), keep],
        rollout={"minibatches": 2},
        max_steps=10,
    )
    records = [
        json.loads(line)
        for line in (tmp_path / "completions" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert [record["rollout"] for record in records] == [0] * 3 + [2] * 3 + [4] * 3
    assert [record["step"] for record in records] == [0] * 3 + [4] * 3 + [8] * 3
    rollout = keep.events[2].experience.rollout
    for record, i in zip(records[3:6], (0, 5, 10), strict=True):
        assert record["prompt"] == rollout.rows[i].prompt
        assert record["completion"] == rollout.texts[i]
        assert record["target"] == rollout.rows[i].target
        assert record["reward"] == keep.events[2].scores.rewards_B[i].item()
    shown = capsys.readouterr().out
    assert shown.count("completion") == 3
    assert "rollout 4" in shown
    assert "rollout 1" not in shown
    assert records[0]["prompt"] in shown


def test_the_table_can_be_left_out_and_markup_is_text(tmp_path, capsys):
    fit(tmp_path, callbacks=[Samples(show=False)], max_steps=1)
    assert "completion" not in capsys.readouterr().out
    Samples._print(
        7, [{"prompt": "[bold]x", "completion": "a\nb" + "c" * 200, "target": "1", "reward": 0.5}]
    )
    shown = capsys.readouterr().out
    assert "[bold]x" in shown
    assert "a⏎b" in shown
    assert "…" in shown
    assert "0.50" in shown


def test_more_than_there_are(tmp_path):
    fit(tmp_path, callbacks=[Samples(count=99, show=False)], max_steps=1)
    assert len((tmp_path / "completions" / "rollouts.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("arguments", [{"every": 0}, {"count": 0}])
def test_counts_are_positive(arguments):
    with pytest.raises(UserError, match="at least 1"):
        Samples(**arguments)
