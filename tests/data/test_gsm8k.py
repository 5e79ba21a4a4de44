"""GSM8K: the public files, and rows in their form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_mpo.data import Gsm8k
from lightning_mpo.errors import UserError

ROW = {
    "question": " Ann buys 2 bags. How much? ",
    "answer": "It is <<2*500=1,000>>1,000.\n#### 1,000",
}


def written(folder: Path, train: list[dict], test: list[dict]) -> Gsm8k:
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Gsm8k(str(folder))


def test_a_row_becomes_a_problem():
    row = Gsm8k().row(ROW, "row 1")
    assert (row.prompt, row.target) == ("Ann buys 2 bags. How much?", "1000")
    assert row.solution == "It is 1,000.\n#### 1,000"
    assert row.extra == ROW
    assert Gsm8k(calculator=True).row(ROW, "row 1").solution == ROW["answer"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("It is 5.", "line 1 of …: 'answer' has no #### before its number"),
        ("#### many", "the number behind #### must be a number"),
        (None, "'answer' is null"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, answer, message):
    data = written(tmp_path, [{**ROW, "answer": answer}], [ROW])
    with pytest.raises(UserError) as caught:
        data.setup("fit")
    assert message.rpartition("…: ")[2] in str(caught.value)
    assert "train.jsonl" in str(caught.value)


def test_files_of_a_folder_are_the_splits(tmp_path):
    other = {**ROW, "question": "And in all?"}
    data = written(tmp_path, [ROW], [other])
    assert [row.prompt for row in data.splits.train] == ["Ann buys 2 bags. How much?"]
    assert [row.prompt for row in data.splits.validation] == ["And in all?"]
    assert "####" in data.suffix


def test_the_public_files_have_a_number_in_each_row(monkeypatch):
    shared = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("LIGHTNING_MPO_DATA") or shared)
    if not (folder / "gsm8k" / "train.jsonl").is_file():
        pytest.skip(f"{folder}/gsm8k is absent; set LIGHTNING_MPO_DATA")
    monkeypatch.setenv("LIGHTNING_MPO_DATA", str(folder))
    splits = Gsm8k().splits
    assert (len(splits.train), len(splits.validation)) == (7473, 1319)
    assert splits.train[0].target == "72"
    assert all(row.target.lstrip("-").isdigit() for row in [*splits.train, *splits.validation])
    assert not any("<<" in row.solution for row in splits.train)
