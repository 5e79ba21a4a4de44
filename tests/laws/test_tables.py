"""A table has the same rows, the same order and the same identity in every format."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lightning_mpo.data import JsonLines, Table

ROWS = [
    {"question": f"{n} é,\n\"+\" {n}?", "answer": f"#### {2 * n}", "work": f"{n}"} for n in range(25)
]  # fmt: skip
COLUMNS = {"prompt": "{{ question }} ", "target": "{{ answer[5:] }}", "solution": "work"}


def write_csv(name: str, delimiter: str) -> None:
    with open(name, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def lines() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


FORMATS: dict[str, Callable[[], Any]] = {
    "rows.jsonl": lambda: Path("rows.jsonl").write_text(lines()),
    "rows.json": lambda: Path("rows.json").write_text(json.dumps(ROWS, indent=1)),
    "rows.jsonl.gz": lambda: Path("rows.jsonl.gz").write_bytes(gzip.compress(lines().encode())),
    "rows.csv": lambda: write_csv("rows.csv", ","),
    "rows.tsv": lambda: write_csv("rows.tsv", "\t"),
    "rows.txt": lambda: write_csv("rows.txt", ";"),
    "rows.parquet": lambda: parquet.write_table(pa.Table.from_pylist(ROWS), "rows.parquet"),
    "hub": lambda: None,
}


@pytest.fixture(params=FORMATS)
def make(request, tmp_path, monkeypatch) -> Callable[..., Table]:
    """Build a table of the rows in one format."""
    monkeypatch.chdir(tmp_path)
    FORMATS[request.param]()
    hub = types.SimpleNamespace(load_dataset=lambda *names, **options: list(ROWS))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = (
        {"train": "train", "hub": "a/b"} if request.param == "hub" else {"train": request.param}
    )
    return lambda owner=Table, **options: owner(**(source | COLUMNS | options))


def test_the_rows_and_their_identity_do_not_depend_on_the_format(make) -> None:
    Path("first.jsonl").write_text(lines())
    first, table = Table("first.jsonl", **COLUMNS), make()
    assert table.splits == first.splits
    assert table.identity() == first.identity()
    assert table.splits.train[0].where != ""
    assert make(JsonLines).splits == first.splits


def test_prompts_are_a_pure_function_of_seed_and_counter(make) -> None:
    for options in ({}, {"order": "file"}, {"few_shot": 3}, {"max_rows": 20, "seed": 4}):
        forward, backward = make(**options), make(**options)
        ahead = [[r.prompt for r in forward.training_rows(i, 4)] for i in range(12)]
        back = [[r.prompt for r in backward.training_rows(i, 4)] for i in reversed(range(12))]
        assert ahead == back[::-1]
        assert len({prompt for rollout in ahead for prompt in rollout}) == len(forward.splits.train)


def test_options_that_change_rows_change_the_identity(make) -> None:
    first = make().identity()
    assert make().identity() == first
    for options in ({"prompt": "{{ question }}"}, {"target": "work", "solution": None},
                    {"max_rows": 24}, {"split_seed": 1}, {"solution": "answer"}):  # fmt: skip
        assert make(**options).identity()["digest"] != first["digest"], options


def test_reading_twice_gives_the_same_rows(make) -> None:
    table = make(few_shot=2, id="question")
    assert table.load() == table.load()
    assert len(table.splits.train) + len(table.splits.validation) == len(ROWS) - 2
