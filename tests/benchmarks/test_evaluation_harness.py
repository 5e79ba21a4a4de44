"""Answers judged by lm-evaluation-harness itself, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluation_harness.py"
DOCS = [
    {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
    {"question": "What is 600 + 634?", "answer": "600 + 634 = 1,234\n#### 1,234"},
    {"question": "What is 9 - 7?", "answer": "9 - 7 = 2\n#### 2"},
]
ANSWERS = [
    ("It is 7.\n#### 7", "7", True),
    ("The sum is 1,234.", "1234", True),  # no ####
    ("#### 2, from 9 - 7", "2", True),  # another number stands last
]


@pytest.fixture
def script(monkeypatch):
    specification = importlib.util.spec_from_file_location("evaluation_harness", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # its dataclass asks for it
    specification.loader.exec_module(module)
    return module


def test_verdicts_of_the_harness_and_reasons_of_differences(script, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    problems = [
        {"prompt": f"Hello. {doc['question']}\nSolve it.", "target": doc["answer"].split()[-1],
         "completion": text, "answer": answer, "right": right}
        for doc, (text, answer, right) in zip(DOCS, ANSWERS, strict=True)
    ]  # fmt: skip
    judged = script.judge(script.task_of(tmp_path), problems)
    assert [row.verdicts["strict-match"] for row in judged] == [True, False, True]
    assert [row.verdicts["flexible-extract"] for row in judged] == [True, True, False]
    text = script.report(judged, 1)
    assert "strict-match: 1 of 3 verdicts differ" in text
    assert "1  right for us; the harness finds no #### or no number" in text
    assert "1  right for us; another number is the last number" in text
