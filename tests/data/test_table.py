"""`Table`: formats, sources, examples and ids; `PublicTable`: where its rows come from."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lightning_mpo.data import PublicTable, Table
from lightning_mpo.data.hub import Hub
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

CHAT = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2", "name": "x"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_MPO_DATA", raising=False)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pa.Table.from_pylist(rows), name)
    return name


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1", "target": i + 1, "work": f"{i}"} for i in range(start, stop)]


def train(*names: Any, **options: Any) -> list[PromptRow]:
    return list(Table(*names, **({"validation_share": 0} | options)).splits.train)


def prompts(table: list[PromptRow]) -> list[str]:
    return [row.prompt for row in table]


def test_parquet() -> None:
    name = write("a.parquet", rows(0, 2500))
    table = train(name)
    assert len(table) == 2500
    assert table[2400] == PromptRow(
        "2400+1", "2401", None, {"prompt": "2400+1", "target": "2401", "work": "2400"}
    )
    assert table[2400].where == "row 2401 of a.parquet"
    Path("rows.jsonl").write_bytes(gzip.compress(Path(name).read_bytes()))
    assert train("rows.jsonl") == table


def test_a_chat_in_parquet_has_no_empty_keys() -> None:
    (row,) = train(write("a.parquet", [{"messages": CHAT, "target": "2"}]))
    assert row.messages == ({"role": "user", "content": "1+1"},)
    assert row.solution == "2"


def test_cells_of_parquet() -> None:
    from decimal import Decimal

    for value, target in ((Decimal("2.50"), "2.5"), (1e-7, "0.0000001"), (True, "true")):
        assert train(write("a.parquet", [{"prompt": "1", "target": value}]))[0].target == target
    for value, message in (
        (float("inf"), "row 1 of a.parquet: 'target' is inf; write a finite number"),
        (None, "row 1 of a.parquet: 'target' is null"),
        ([1], "'target' must be text or a number, got list"),
    ):
        with pytest.raises(UserError, match=message):
            train(write("a.parquet", [{"prompt": "1", "target": value}]))


def test_damaged_parquet() -> None:
    content = Path(write("a.parquet", rows(0, 2000))).read_bytes()
    for damage in (content[:-50], content[:4] + b"x" * 200 + content[204:]):
        Path("a.parquet").write_bytes(damage)
        with pytest.raises(UserError, match="a.parquet is Parquet and cannot be read") as refusal:
            train("a.parquet")
        assert "\n" not in str(refusal.value)
    table = pa.table([[1], [2]], names=["a", "b"]).rename_columns(["prompt", "prompt"])
    parquet.write_table(table, "b.parquet")
    with pytest.raises(UserError, match="b.parquet has the column 'prompt' twice"):
        train("b.parquet")


def test_several_files_and_patterns() -> None:
    write("part-1.parquet", rows(0, 2))
    write("part-0.parquet", rows(2, 4))
    Path("more.csv").write_text("prompt,target\n9+1,10\n")
    assert prompts(train("part-*.parquet")) == ["2+1", "3+1", "0+1", "1+1"]
    assert prompts(train(["part-1.parquet", "more.csv"])) == ["0+1", "1+1", "9+1"]
    with pytest.raises(UserError, match=r"there is no file b-\*.parquet"):
        train("b-*.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_max_rows_reads_no_further(suffix: str) -> None:
    """Damage behind the last row that is read goes unnoticed."""
    lines = "\n".join(map(json.dumps, rows(0, 5)))
    content = {
        "jsonl": f"\n{lines}\n{{".encode(),
        "json": json.dumps(rows(0, 6)).encode(),
        "csv": b'prompt,target\n0+1,1\n1+1,"2"\n2+1,3\n"',
        "parquet": Path(write("x.parquet", rows(0, 6))).read_bytes(),
        "jsonl.gz": gzip.compress(f"{lines}\n".encode()),
    }[suffix]
    Path(f"a.{suffix}").write_bytes(content)
    assert prompts(train(f"a.{suffix}", max_rows=3)) == ["0+1", "1+1", "2+1"]


def test_max_rows_of_lines_reads_no_further() -> None:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows(0, 3))) + "\n{")
    assert len(train("a.jsonl", max_rows=3)) == 3
    with pytest.raises(UserError, match="line 4 of a.jsonl is not JSON"):
        train("a.jsonl", max_rows=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True}, "`data.streaming` needs `data.max_rows`"),
        ({"subset": "main"}, "`data.subset` is a part of `data.hub`"),
        ({"hub": "a b"}, "`data.hub` must be an id"),
        ({"prompt": "{{ a"}, "`data.prompt` is not a valid Jinja template"),
        ({"few_shot": 0}, "`Table.few_shot` must be at least 1, got 0"),
        ({"max_rows": 0}, "`Table.max_rows` must be at least 1, got 0"),
        ({"train": []}, "`data.train` names no file"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Table(**({"train": "a.jsonl"} | options))


def test_ids_differ() -> None:
    write("a.parquet", [*rows(0, 3), *rows(1, 2)])
    write("b.parquet", rows(4, 5))
    with pytest.raises(
        UserError, match=r"row 4 of a.parquet: 'work' is '1', as in row 2 of a.parquet; ids must"
    ):
        train("a.parquet", id="work")
    write("c.parquet", [{**row, "work": "4"} for row in rows(9, 10)])
    with pytest.raises(UserError, match=r"row 1 of c.parquet: 'work' is '4', as in row 1 of b"):
        train("b.parquet", "c.parquet", id="work")
    with pytest.raises(UserError, match="row 1 of b.parquet has no 'ids'"):
        train("b.parquet", id="ids")
    table = Table("b.parquet", id="work", validation_share=0)
    assert table.load() == table.load()


def test_examples_are_left_out_of_training() -> None:
    write("a.parquet", rows(0, 5))
    table = Table("a.parquet", solution="work", few_shot=2, validation_share=0)
    assert prompts(list(table.splits.train)) == ["2+1", "3+1", "4+1"]
    assert prompts(list(table.shots)) == ["0+1", "1+1"]
    assert table.load() == table.load()
    other = rows(0, 5)
    other[0]["work"] = "7"
    write("a.parquet", other)
    again = Table("a.parquet", solution="work", few_shot=2, validation_share=0)
    assert again.identity()["digest"] != table.identity()["digest"], "examples are compared, too"
    with pytest.raises(UserError, match="`data.few_shot` = 5 takes all 5 rows to train on"):
        train("a.parquet", solution="work", few_shot=5)
    with pytest.raises(
        UserError, match=r"the prompt '0\+1' .* has no solution for `data.few_shot`"
    ):
        train("a.parquet", few_shot=1)


def test_an_empty_table() -> None:
    Path("a.csv").write_text("prompt,target\n")
    for options in ({}, {"few_shot": 2}):
        with pytest.raises(UserError, match="`Table` found no training rows"):
            train("a.csv", **options)


def test_a_table_without_targets() -> None:
    table = Table(write("a.parquet", rows(0, 2)), target=None, validation_share=0)
    assert [row.target for row in table.splits.train] == ["", ""]
    assert not table.judged


class Sums(PublicTable):
    FOLDER = "sums"
    TRAIN = Hub("nobody/sums", "train", file="train.jsonl")
    VALIDATION = Hub("nobody/sums", "test", "main", file="test.jsonl")
    PROMPT = "{{ prompt }}="

    def row(self, record: Any, where: str) -> PromptRow | None:
        return None if record["prompt"] == "1+1" else super().row(record, where)


def test_a_public_table_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        calls.append((*names, options["split"], options["streaming"]))
        return rows(0, 3) if options["split"] == "train" else rows(2, 4)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    table = Sums()
    assert calls == []
    table.prepare_data()
    assert calls == [
        ("nobody/sums", None, "train", False),
        ("nobody/sums", "main", "test", False),
    ]
    assert prompts(list(table.splits.train)) == ["0+1=", "2+1="]
    assert prompts(list(table.splits.validation)) == ["2+1=", "3+1="]
    assert Sums(streaming=True, max_rows=1).splits.train == table.splits.train[:1]
    assert calls[-1][-1]


def test_a_public_table_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sums").mkdir()
    for name, content in (("train", rows(0, 3)), ("test", rows(2, 4))):
        Path(f"sums/{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    splits = Sums("sums").splits
    assert prompts(list(splits.train)) == ["0+1=", "2+1="]
    assert prompts(list(splits.validation)) == ["2+1=", "3+1="], "public splits are not refused"
    monkeypatch.setenv("LIGHTNING_MPO_DATA", ".")
    assert Sums().splits == splits
    with pytest.raises(UserError, match="`data.path` must be the folder with train.jsonl and test"):
        _ = Sums("sums/train.jsonl").splits
    Path("sums/test.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no file sums/test.jsonl"):
        _ = Sums().splits


class OneFile(Sums):
    VALIDATION = None


def test_a_public_table_of_one_file() -> None:
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows(0, 11))))
    for path in (".", "train.jsonl"):
        splits = OneFile(path).splits
        assert (len(splits.train), len(splits.validation)) == (9, 1)
