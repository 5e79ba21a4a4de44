"""Predictions: one record per completion, in the run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from lightning_mpo.callbacks import Predictions, RolloutLoop
from lightning_mpo.callbacks.predictions import print_orders
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from tests.support.runs import Digits, make_data, make_objective, make_policy

ROOT = Path(__file__).parents[2]


def test_predict_writes_every_completion_and_begins_afresh(tmp_path):
    def predict() -> list[dict]:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
            callbacks=[RolloutLoop([Digits()], max_new_tokens=6, validation_completions=2), Predictions()],
        )  # fmt: skip
        trainer.predict(PolicyOptimization(make_policy(), make_objective()), datamodule=make_data())
        return [
            json.loads(line)
            for line in (tmp_path / "completions" / "predictions.jsonl").read_text().splitlines()
        ]

    records, rows = predict(), make_data().splits.validation
    assert [record["prompt"] for record in records] == [
        row.prompt for row in rows for _ in range(2)
    ]
    assert [record["target"] for record in records] == [
        row.target for row in rows for _ in range(2)
    ]
    digits = [
        sum(c in "01234" for c in r["completion"]) / max(len(r["completion"]), 1) for r in records
    ]
    assert all(
        abs(record["reward"] - share) < 1e-6 for record, share in zip(records, digits, strict=True)
    )
    assert predict() == records


KILLED = """
import os, signal, sys
import lightning as L
from lightning_mpo.callbacks import Predictions, RolloutLoop
from lightning_mpo.data import PromptFile
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from tests.support.runs import Probe, make_objective, make_policy

data = PromptFile("prompts.jsonl", validation_batch_size=2)
kill = Probe(on_predict_batch_start=lambda *args: os.kill(os.getpid(), signal.SIGKILL) if args[3] == 2 else None)
trainer = L.Trainer(
    accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
    callbacks=[RolloutLoop([], max_new_tokens=6), Predictions(), kill],
)
trainer.predict(PolicyOptimization(make_policy(), make_objective()), datamodule=data, return_predictions=False)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_the_whole_lines_of_the_batches_before(tmp_path):
    lines = [json.dumps({"prompt": f"{n}+{n}=", "id": n}) for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    text = (tmp_path / "completions" / "predictions.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["id"] for line in text.splitlines()] == [0, 1, 2, 3]


def test_orders_are_printed_below_the_prompts(capsys, monkeypatch):
    records = [
        {"prompt": "17+25=\n", "tokens": ["4", "2", "<end>"], "steps": [1, 0, 2]},
        {"prompt": "x" * 200, "tokens": [" a"] * 50, "steps": list(range(50))},
    ]
    print_orders(records)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "order      below each token: the step that revealed it, from 0; _ is a space", "",
        "17+25=", "4 2 <end>", "1 0 2",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert lines[6] == "x" * 38 + " ... " + "x" * 37
    # colours in a terminal, unless they are not wanted
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for value, count in (("", 3), ("1", 0)):
        monkeypatch.setenv("NO_COLOR", value)
        print_orders(records[:1])
        assert capsys.readouterr().out.count("\x1b[38;5;") == count


def test_a_causal_policy_has_no_order_to_show(capsys):
    for records in ([], [{"prompt": "1+1=", "completion": "2"}]):
        print_orders(records)
        line = "order      none to show: a causal policy draws tokens from left to right\n"
        assert capsys.readouterr().out == line


def test_the_first_completions_are_shown(tmp_path, capsys):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    writer = Predictions(show_order=3)
    for name in ("a", "b"):
        writer.on_predict_start(trainer, L.LightningModule())
        for n in range(2):
            batch = [{"prompt": f"{name}{n}{m}", "tokens": ["1"], "steps": [m]} for m in range(2)]
            writer.write_on_batch_end(trainer, L.LightningModule(), batch, None, None, n, 0)
        writer.on_predict_end(trainer, L.LightningModule())
        lines = capsys.readouterr().out.splitlines()
        assert [lines[i] for i in range(3, len(lines), 4)] == [
            f"{name}00", f"{name}01", f"{name}10",
        ]  # fmt: skip


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "completions").write_text("a file")
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(
        UserError, match=r"predictions cannot be written to .*; set `trainer.default_root_dir`"
    ):
        Predictions().on_predict_start(trainer, L.LightningModule())


def test_a_full_disk_is_told(tmp_path):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    writer = Predictions()
    writer._path = lambda trainer: Path("/dev/full")
    with pytest.raises(
        UserError, match="predictions cannot be written to /dev/full: No space left on device"
    ):
        writer.write_on_batch_end(trainer, L.LightningModule(), [{"prompt": "1"}], None, None, 0, 0)
