"""`CodeAnswer`: what passes, what counts as an answer, and what is not judged."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import CodeAnswer, Completion, score_all
from lightning_mpo.rewards.sandbox import Limits
from tests.support.sandboxes import PATIENT, isolating_level

MBPP = {"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
RIGHT, HALF = "```python\ndef f(x):\n    return x + 1\n```", "def f(x):\n    return 2"


def completion(text: str, row: Mapping[str, Any] = MBPP, finished: bool = True) -> Completion:
    return Completion("prompt", text, "", 3, finished, row)


@pytest.fixture(scope="module")
def reward() -> CodeAnswer:
    isolating_level()
    return CodeAnswer(limits=PATIENT)


def test_scores_and_answers(reward: CodeAnswer) -> None:
    texts = {
        RIGHT: (1.0, True),
        HALF: (0.0, True),
        "<think>```python\nx\n```</think>" + RIGHT: (1.0, True),
        "<think>" + RIGHT: (0.0, False),
        "The function adds one.": (0.0, False),
        "if you add one": (0.0, False),
        "```rust\nfn f() {}\n```": (0.0, False),
        "import os\nos._exit(0)": (0.0, True),
        "def f(x) return x + 1": (0.0, False),
        "": (0.0, False),
    }
    batch = [completion(text) for text in texts]
    assert list(zip(reward.score(batch), reward.answered(batch), strict=True)) == list(
        texts.values()
    )


def test_a_response_that_was_cut_off(reward: CodeAnswer) -> None:
    batch = [completion(RIGHT, finished=False)]
    assert reward.score(batch) == [0.0]
    lenient = CodeAnswer(require_finished=False, limits=PATIENT)
    assert lenient.score(batch) == [1.0]


def test_the_share_of_tests() -> None:
    isolating_level()
    reward = CodeAnswer(partial=True, limits=PATIENT)
    humaneval = {
        "test": "def check(f):\n    assert True\n    assert f(1) == 2\n    assert f(2) == 3",
        "entry_point": "f",
    }
    contest = {"inputs": ["1", "2"], "outputs": ["2", "3"]}
    rows = [MBPP, humaneval, contest]
    texts = [HALF, HALF, "print(2)"]
    batch = [completion(text, row) for text, row in zip(texts, rows, strict=True)]
    assert reward.score(batch) == [0.5] * 3


def test_outputs_are_not_kept(reward: CodeAnswer) -> None:
    texts = ["print('x' * 1000)", "print(1)"]
    assert reward.score([completion(t, {"inputs": ["1"], "outputs": ["1"]}) for t in texts]) == [
        0.0,
        1.0,
    ]
    assert [result.output for result in reward._results.values()] == [b"", b""]


def test_rows_that_are_not_judged(reward: CodeAnswer) -> None:
    broken = {"test_list": ["import no_such_module\nassert f(1) == 2"], "test_setup_code": "1 / 0"}
    with pytest.warns(UserWarning, match="the tests of a row cannot run: their setup raised"):
        assert reward.score([completion(RIGHT, broken)]) == [None]
    with pytest.warns(UserWarning, match="a row has no tests"):
        assert reward.score([completion(RIGHT, {"test_list": []})]) == [None]
    scores = score_all([reward], [completion(RIGHT, {}), completion(RIGHT)])
    assert scores.decided_B.tolist() == [False, True]
    assert scores.correct_B.tolist() == [False, True]


def test_each_program_runs_once_in_a_batch() -> None:
    isolating_level()
    reward = CodeAnswer(limits=PATIENT)
    batch = [
        completion(RIGHT),
        completion(RIGHT),
        completion(HALF),
        completion("import os\nos._exit(0)"),
    ]
    with pytest.warns(UserWarning, match="1 of 3 programs ended before their tests did"):
        assert reward.score(batch) == [1.0, 1.0, 0.0, 0.0]
    reward.answered(batch)
    assert dict(reward.ends) == {"exit": 2, "crash": 1}


def test_a_program_that_hangs_costs_its_sample_alone() -> None:
    isolating_level()
    reward = CodeAnswer(limits=Limits(seconds=600, wall_seconds=2))
    assert reward.score([completion("import time\ntime.sleep(900)")]) == [0.0]
    assert dict(reward.ends) == {"time": 1}


def test_it_starts_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str], caplog) -> None:
    isolating_level()
    reward = CodeAnswer(limits=PATIENT)
    with caplog.at_level("INFO"):
        reward.check(64)
    assert "isolated by bubblewrap" in caplog.text


def test_columns_are_needed() -> None:
    reward = CodeAnswer()
    reward.check_columns(["test_list", "text"])
    with pytest.raises(
        UserError, match=r"needs columns with tests: .* the data have `test`, `text`"
    ):
        reward.check_columns(["test", "text"])


def test_it_can_be_copied(reward: CodeAnswer) -> None:
    copied = pickle.loads(pickle.dumps(reward))
    assert copied.score([completion(RIGHT)]) == [1.0]


CHANGED = """

_right = {entry}

def {entry}(*arguments):
    value = _right(*arguments)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return [*value, 77]
    return {{"changed": 1}} if value != {{"changed": 1}} else 7
"""


@pytest.mark.slow
def test_humaneval() -> None:
    """All 164 solutions are right; with each result changed, all are wrong."""
    folder = os.environ.get("LIGHTNING_MPO_DATA") or Path(__file__).parents[3] / "shared" / "data"
    file = Path(folder) / "humaneval" / "HumanEval.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent; set LIGHTNING_MPO_DATA")
    isolating_level()
    rows = list(map(json.loads, gzip.decompress(file.read_bytes()).splitlines()))
    reward = CodeAnswer(limits=PATIENT)
    bodies = [row["canonical_solution"] for row in rows]
    mutants = [
        row["prompt"] + body + CHANGED.format(entry=row["entry_point"])
        for row, body in zip(rows, bodies, strict=True)
    ]
    repeated = [
        f"Here:\n```python\n{row['prompt']}{body}```"
        for row, body in zip(rows, bodies, strict=True)
    ]
    for texts, right in ((bodies, 1.0), (repeated, 1.0), (mutants, 0.0)):
        batch = [completion(text, row) for text, row in zip(texts, rows, strict=True)]
        scores = reward.score(batch)
        assert [
            row["task_id"] for row, score in zip(rows, scores, strict=True) if score != right
        ] == []
        assert all(reward.answered(batch))
    assert len(rows) == 164
