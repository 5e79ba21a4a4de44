"""`Svamp`: the rows, the split, and what a broken file says."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data import Svamp
from lightning_mpo.data.svamp import _join
from lightning_mpo.errors import UserError

ROW = {
    "ID": "chal-1",
    "Body": "If a pack costs $ 76",
    "Question": "How much do you pay?",
    "Answer": 51.0,
    "Type": "-",
}


def write(folder: Path, rows: Any) -> Path:
    file = folder / "SVAMP.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def rows(count: int) -> list[dict[str, Any]]:
    return [ROW | {"Body": f"There are {i} birds.", "Answer": float(i)} for i in range(count)]


def prompts(part: Any) -> list[str]:
    return [row.prompt for row in part]


def test_a_row(tmp_path: Path) -> None:
    data = Svamp(path=str(write(tmp_path, [ROW, *rows(1)])), validation_share=0)
    assert data.splits.train[0].prompt == "If a pack costs $76, how much do you pay?"
    assert data.splits.train[0].target == "51"
    assert data.splits.train[0].extra == {"ID": "chal-1", "Answer": 51.0, "Type": "-"}
    assert data.splits.validation == []


@pytest.mark.parametrize(
    ("equation", "solution"),
    [
        ("( 76.0 - 25.0 )", "76 - 25 = 51"),
        ("( ( 4.0 - 2.5 ) * 100.0 )", "(4 - 2.5) * 100 = 51"),
        ("( 4.0 - ( 2.0 + 3.0 ) )", "4 - (2 + 3) = 51"),
        (None, None),
    ],
)
def test_the_equation_is_the_solution(
    tmp_path: Path, equation: str | None, solution: str | None
) -> None:
    data = Svamp(path=str(write(tmp_path, [ROW | {"Equation": equation}])), validation_share=0)
    assert data.splits.train[0].solution == solution


@pytest.mark.parametrize(
    ("body", "question", "text"),
    [
        ("He ran.", "How far?", "He ran. How far?"),
        ("He ran ", " How far?", "He ran. How far?"),
        ("He ran. If it rained", "How far?", "He ran. If it rained, how far?"),
        ("If it rained. He ran", "How far?", "If it rained. He ran. How far?"),
        ("He  ran , then walked .", "How far ?", "He ran, then walked. How far?"),
        ("It cost $ 3.5.", "Why?", "It cost $3.5. Why?"),
        ("", "How far?", "How far?"),
    ],
)
def test_punctuation(body: str, question: str, text: str) -> None:
    assert _join(body, question) == text


@pytest.mark.parametrize(
    ("answer", "target"),
    [(51.0, "51"), ("0.50", "0.5"), (-3, "-3"), ("1,000.0", "1000"), (0.0, "0")],
)
def test_targets_are_plain_numbers(tmp_path: Path, answer: Any, target: str) -> None:
    data = Svamp(path=str(write(tmp_path, [ROW | {"Answer": answer}])), validation_share=0)
    assert data.splits.train[0].target == target


@pytest.mark.parametrize(("share", "count"), [(0.3, 6), (0.0, 0), (5, 5), (5.0, 5), (0.31, 6)])
def test_validation_share(tmp_path: Path, share: float, count: int) -> None:
    splits = Svamp(path=str(write(tmp_path, rows(20))), validation_share=share).splits
    assert (len(splits.train), len(splits.validation)) == (20 - count, count)


def test_split_depends_on_split_seed_only(tmp_path: Path) -> None:
    path = str(write(tmp_path, rows(40)))
    first = Svamp(path=path, seed=1).splits
    assert Svamp(path=path, seed=2).splits == first
    assert Svamp(path=path, split_seed=1).splits != first
    write(tmp_path, rows(40)[::-1])
    assert set(prompts(Svamp(path=path).splits.validation)) == set(prompts(first.validation))
    assert prompts(first.train) == sorted(
        prompts(first.train), key=lambda text: int(text.split()[2])
    )  # file order


def test_equal_prompts_stand_on_one_side(tmp_path: Path) -> None:
    twice = rows(30) + [
        row | {"ID": "again", "Body": row["Body"].replace(" birds.", "  birds .")}
        for row in rows(30)
    ]
    splits = Svamp(path=str(write(tmp_path, twice)), validation_share=0.5).splits
    assert len(splits.train) == len(splits.validation) == 30
    assert not set(prompts(splits.train)) & set(prompts(splits.validation))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-0.1, "must be a share below 1 or a whole number of prompts, got -0.1"),
        (2.5, "must be a share below 1 or a whole number of prompts, got 2.5"),
        (float("nan"), "must be a share below 1 or a whole number"),
        (
            4,
            r"`data.validation_share` \(4\) takes 4 of the 4 different prompts and leaves none to train on",
        ),
        (0.99, "leaves none to train on"),
    ],
)
def test_impossible_shares(tmp_path: Path, share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = Svamp(path=str(write(tmp_path, rows(4))), validation_share=share).splits


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"Answer": None}, "row 2 of .*SVAMP.json: 'Answer' is null"),
        ({"Body": None}, "row 2 of .*SVAMP.json: 'Body' is null"),
        ({"Question": 7}, "row 2 of .*SVAMP.json: 'Question' must be text, got int"),
        ({"Answer": "many"}, "row 2 of .*SVAMP.json: 'Answer' must be a number, got 'many'"),
        ({"Answer": "inf"}, "must be a number, got 'inf'"),
    ],
)
def test_broken_rows(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = Svamp(path=str(write(tmp_path, [ROW, ROW | broken]))).splits


def test_missing_column_suggests_the_near_one(tmp_path: Path) -> None:
    row = {("Answers" if key == "Answer" else key): value for key, value in ROW.items()}
    with pytest.raises(
        UserError,
        match=r"row 1 of .* has no 'Answer'; its columns are .*; did you mean 'Answers'\?",
    ):
        _ = Svamp(path=str(write(tmp_path, [row]))).splits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 of .*SVAMP.json is not JSON: Expecting property name"),
        ("{}", "line 1 of .*SVAMP.json has no 'Body'"),
        ("[3]", "row 1 of .*SVAMP.json must be an object with columns, got int"),
        ("[]", "`Svamp` found no training rows"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = Svamp(path=str(write(tmp_path, content))).splits


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UserError, match="there is no file .*json"):
            _ = Svamp(path=str(path)).splits


def test_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "svamp").mkdir()
    write(tmp_path / "svamp", rows(10))
    monkeypatch.setenv("LIGHTNING_MPO_DATA", str(tmp_path))
    assert Svamp().splits == Svamp(path=str(tmp_path / "svamp")).splits


def test_hub_rows_give_the_same_split_as_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub serves two splits in another order, and answers as text."""
    table = [row | {"Answer": str(row["Answer"])} for row in rows(20)[::-1]]
    requests: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        requests.append((*arguments, options["split"]))
        return table

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("LIGHTNING_MPO_DATA", raising=False)
    theirs, ours = Svamp().splits, Svamp(path=str(write(tmp_path, rows(20)))).splits
    assert requests == [("ChilleD/SVAMP", None, "test+train")]
    assert sorted(prompts(theirs.validation)) == sorted(prompts(ours.validation))
    assert {r.target for r in theirs.train} == {r.target for r in ours.train}


def test_the_real_file() -> None:
    folder = os.environ.get("LIGHTNING_MPO_DATA") or Path(__file__).parents[3] / "shared" / "data"
    file = Path(folder) / "svamp" / "SVAMP.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent; set LIGHTNING_MPO_DATA")
    splits = Svamp(path=str(file)).splits
    assert (len(splits.train), len(splits.validation)) == (700, 300)
    first = next(r for r in [*splits.train, *splits.validation] if r.extra["ID"] == "chal-1")
    assert first.prompt.endswith(
        "of 25 dollars on each pack, how much do you have to pay to buy each pack?"
    )
    assert first.target == "51"
    assert all(row.prompt.isascii() and "  " not in row.prompt for row in splits.train)
    assert all(row.target.lstrip("-").replace(".", "", 1).isdigit() for row in splits.train)
