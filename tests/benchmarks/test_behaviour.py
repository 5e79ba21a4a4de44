"""The record of behaviour: it repeats itself, and a changed number shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location(
    "behaviour", ROOT / "benchmarks" / "behaviour.py"
)
assert specification is not None
assert specification.loader is not None
behaviour = importlib.util.module_from_spec(specification)
specification.loader.exec_module(behaviour)


@pytest.mark.slow
def test_a_record_repeats_itself_and_shows_another_learning_rate(monkeypatch):
    first, again = behaviour.record(["grpo"]), behaviour.record(["grpo"])
    assert list(behaviour.differences(first, again)) == []
    assert first["grpo"]["objective"].startswith(
        "support FullVocabulary() | actions TokenActions()"
    )
    assert first["grpo"]["resumed"] == {key: first["grpo"][key] for key in ("weights", "moments")}
    assert len(first["grpo"]["metrics"]["loss/surrogate"]) == 4
    monkeypatch.setattr(behaviour, "BASE", behaviour.BASE.replace("lr: 3.0e-3", "lr: 3.1e-3"))
    places = [
        line.split(":")[0] for line in behaviour.differences(first, behaviour.record(["grpo"]))
    ]
    assert "/grpo/weights" in places
    assert "/grpo/objective" not in places


def test_what_only_one_record_holds_is_a_difference():
    assert list(behaviour.differences({"a": {"b": 1}}, {"a": {"c": 1}})) == [
        "/a/b: only before",
        "/a/c: only after",
    ]
    assert list(behaviour.differences({"a": [1, 2]}, {"a": [1, 3]})) == ["/a: [1, 2] | [1, 3]"]
