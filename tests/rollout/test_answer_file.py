"""A file of answers is whole or goes on, and is never taken for that of another evaluation."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.rollout.answer_file import (
    AnswerFile,
    Sampled,
    check_comparable,
    describe,
    difference,
    read_answers,
)
from lightning_mpo.rollout.evaluation import Decoding
from tests.support.runs import Digits, make_data, make_policy

PROBLEMS = [{"problem": n, "samples": [{"right": True}]} for n in range(5)]


def about(greedy=False, policy=None, **more):
    data = make_data()
    sampled = Sampled(Decoding(FullVocabulary(), 2, greedy), 1.0, 8, 0)
    rows = [*data.splits.validation, *data.splits.train[:1]]
    return describe("sums", policy or make_policy(), data, rows, [Digits()], sampled, **more)


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "sums.jsonl"
    file = AnswerFile(path, about(model="m"))
    assert file.resume(2) == []
    file.begin()
    file.add(PROBLEMS[:3])
    assert not path.exists()
    with pytest.raises(UserError, match="has not ended: run it again"):
        read_answers(path)
    # the batch of the third problem is not complete
    again = AnswerFile(path, about(model="m"))
    assert again.resume(2) == PROBLEMS[:2]
    again.begin(PROBLEMS[:2])
    again.add(PROBLEMS[2:])
    again.finish()
    assert read_answers(path) == (about(model="m"), PROBLEMS)
    assert again.resume(2) == PROBLEMS
    assert [entry.name for entry in path.parent.iterdir()] == ["sums.jsonl"]


@pytest.mark.parametrize("cut", [1, 30, 2000])
def test_a_kill_within_a_line_loses_that_line_alone(tmp_path, cut):
    file = AnswerFile(tmp_path / "sums.jsonl", about())
    file.begin(PROBLEMS[:2])
    file.part.write_bytes(file.part.read_bytes()[:-cut])
    assert file.resume(1) == (PROBLEMS[:1] if cut < 2000 else [])


def test_answers_of_another_evaluation_do_not_go_on(tmp_path):
    AnswerFile(tmp_path / "sums.jsonl", about(model="first")).begin(PROBLEMS[:2])
    with pytest.raises(UserError, match="another evaluation .model: 'second' here, 'first' there"):
        AnswerFile(tmp_path / "sums.jsonl", about(model="second")).resume(1)
    with pytest.raises(UserError, match="settings.greedy: True here, False there"):
        AnswerFile(tmp_path / "sums.jsonl", about(greedy=True)).resume(1)


def test_only_like_evaluations_are_compared():
    check_comparable(about(model="first"), about(model="second", step=3), "FILE")
    with pytest.raises(
        UserError, match="FILE has other settings .settings|FILE has other settings"
    ):
        check_comparable(about(), about(greedy=True), "FILE")
    with pytest.raises(UserError, match=r"of other problems: 'sums' \(5 problems\) here, 'x' \(2"):
        check_comparable(about(), about() | {"rows": "1", "benchmark": "x", "problems": 2}, "FILE")
    other = about(policy=make_policy(layers=3))
    with pytest.raises(UserError, match=r"another model \(llama 3 32 \d+, not llama 2 32 \d+\)"):
        check_comparable(about(), other, "FILE")
    check_comparable(about(), other, "FILE", other_model=True)
    assert difference(about(), about()) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("{}\n", "line 1 is damaged"),
        ("[1]\n", "line 1 is damaged"),
        ('{"rows": 1, "problems": 1, "settings": {}}\n', "holds 0 of 1 problems"),
        ('{"rows": 1, "problems": 1, "settings": {}}\n{"problem": 0', "last line is cut off"),
        ('{"rows": 1, "problems": 1, "settings": {}}\nx\n', "line 2 is damaged"),
        (
            '{"rows": 1, "problems": 1, "settings": {}}\n{"problem": 1, "samples": []}\n',
            "line 2 is damaged",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "sums.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_answers(path)


def test_the_description_comes_back_from_a_file_as_it_was():
    assert json.loads(json.dumps(about(step=3))) == about(step=3)
