"""Predictions: one record per completion, in the run folder."""

from __future__ import annotations

import json

import lightning as L

from lightning_mpo.callbacks import Predictions, Rollout
from lightning_mpo.modules import PolicyOptimization
from tests.modules.runs import Digits, make_data, make_objective, make_policy


def test_predict_writes_every_completion_and_begins_afresh(tmp_path):
    def predict() -> list[dict]:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
            callbacks=[Rollout([Digits()], max_new_tokens=6, validation_completions=2), Predictions()],
        )  # fmt: skip
        trainer.predict(PolicyOptimization(make_policy(), make_objective()), datamodule=make_data())
        return [json.loads(line) for line in (tmp_path / "completions" / "predictions.jsonl").read_text().splitlines()]

    records, rows = predict(), make_data().splits.validation
    assert [record["prompt"] for record in records] == [row.prompt for row in rows for _ in range(2)]
    assert [record["target"] for record in records] == [row.target for row in rows for _ in range(2)]
    digits = [sum(c in "01234" for c in r["completion"]) / max(len(r["completion"]), 1) for r in records]
    assert all(abs(record["reward"] - share) < 1e-6 for record, share in zip(records, digits, strict=True))
    assert predict() == records
