"""Splits of the hub; the hub itself is replaced."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from lightning_mpo.data.hub import Hub
from lightning_mpo.errors import UserError


class DatasetNotFoundError(Exception):
    """Stands for the class of that name in `datasets`."""


def serve(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_rows_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Any:
        calls.append((names, options))
        return iter([{"n": i} for i in range(5)])

    serve(monkeypatch, load)
    hub = Hub("openai/gsm8k", "train[:9]", "main", streaming=True)
    assert list(hub.rows(2)) == [
        ("row 1 of openai/gsm8k, main, train[:9]", {"n": 0}),
        ("row 2 of openai/gsm8k, main, train[:9]", {"n": 1}),
    ]
    assert calls == [(("openai/gsm8k", "main"), {"split": "train[:9]", "streaming": True})]
    hub.download()
    assert len(calls) == 1, "streamed rows are not downloaded"
    Hub("a/b", "test").download()
    assert calls[1] == (("a/b", None), {"split": "test", "streaming": False})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "there is no data set 'a/b' on the hub, or it needs a"),
        (ConnectionError("Couldn't reach 'a/b'"), r"a/b, test from the hub, which is out of reach \(ConnectionError\)"),
        (ValueError("Unknown split\n\"test\". Should be one of ['train']"), r"Unknown split \"test\". Should be one of"),
        (ValueError("Config name is missing. Pick one of ['main']" + "x" * 900), "Config name is missing. Pick"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*names: Any, **options: Any) -> Any:
        raise error

    def fail(*names: Any, **options: Any) -> Any:
        yield {"n": 1}
        raise error

    for load in (refuse, fail):
        serve(monkeypatch, load)
        with pytest.raises(UserError, match=message) as refusal:
            list(Hub("a/b", "test").rows())
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["", "/data/rows.parquet", "a/b/c", "https://x.y/z"])
def test_an_id_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match="`data.hub` must be an id of the Hugging Face hub"):
        Hub(name, "train")
    with pytest.raises(UserError, match="must name splits"):
        Hub("a/b", "")
