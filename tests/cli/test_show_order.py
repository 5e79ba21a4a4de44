"""`predict --show-order` prints the step below each token of the first completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.configurations import BASE
from tests.support.exported_runs import run_or_export

MASKED = """\
model:
  init_args:
    policy: {class_path: TinyMaskedPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2}}
    objective: {likelihood: Denoising}
rollout: {sampler: {class_path: DiffusionSampler, init_args: {block: 3}}, validation_completions: 2}
"""


@pytest.fixture
def predict(monkeypatch, tmp_path, capsys) -> Callable[..., list[str]]:
    """Return a function that predicts and returns the printed lines from `predicted` on."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("masked.yaml").write_text(MASKED)

    def call(*arguments: str) -> list[str]:
        assert run_or_export(monkeypatch)("predict", "-c", "base.yaml", *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        (start,) = [n for n, line in enumerate(lines) if line.startswith("predicted ")]
        return lines[start + 1 :]

    return call


def records() -> list[dict]:
    text = Path("run/completions/predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_order_of_the_first_completions_is_printed(predict):
    lines = predict("-c", "masked.yaml", "--show-order")
    assert (
        lines[0] == "order      below each token: the step that revealed it, from 0; _ is a space"
    )
    assert len(lines) == 1 + 4 * 4
    assert max(map(len, lines)) <= 80
    for record, start in zip(records(), range(2, len(lines), 4), strict=False):
        assert lines[start] == record["prompt"]
        assert lines[start + 1].split() == [token.replace(" ", "_") for token in record["tokens"]]
        assert list(map(int, lines[start + 2].split())) == record["steps"]
    assert all(len(record["tokens"]) == len(record["steps"]) <= 6 for record in records())


def test_predictions_alone_print_no_order(predict):
    assert predict("-c", "masked.yaml") == []
    assert "steps" in records()[0]


def test_a_causal_policy_has_none(predict):
    assert predict("--show-order") == [
        "order      none to show: a causal policy draws tokens from left to right"
    ]
    assert "steps" not in records()[0]


def test_validation_samples_from_the_support_as_well(predict, monkeypatch, capsys):
    Path("masked.yaml").write_text(
        MASKED.replace("Denoising}", "Denoising, support: {class_path: TopK, init_args: {k: 3}}}")
    )
    arguments = ["-c", "base.yaml", "-c", "masked.yaml", "--trainer.limit_val_batches", "1"]
    assert run_or_export(monkeypatch)("validate", *arguments) == 0
    printed = capsys.readouterr().out
    assert "val/pass_at_1" in printed
    assert "val/support_pass_at_1" in printed
