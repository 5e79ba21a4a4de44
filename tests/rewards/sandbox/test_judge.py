"""The side of the tests: names, assertions, and answers of a program that are no answers."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from lightning_mpo.rewards.sandbox.inside import frames
from lightning_mpo.rewards.sandbox.inside.judge import (
    Link,
    LostError,
    Remote,
    expected_names,
    judge,
)


@pytest.mark.parametrize(
    ("test", "names"),
    [
        ("assert f(1) == 2", {"f"}),
        ("assert set(f((1, 2))) == set(g(3))", {"f", "g"}),
        ("assert sum(1, 2) == 3", {"sum"}),
        ("assert math.isclose(f(1), 2)", {"f"}),
        ("for x in range(3):\n    assert f(x, len([x])) == x", {"f"}),
        ("import os\ndef check(g):\n    try:\n        g(os)\n    except ValueError as e:\n        h(e)\ncheck(f)", {"f", "h"}),
        ("assert len(sorted([1])) == 1", set()),
    ],
)  # fmt: skip
def test_names_that_tests_expect(test: str, names: set[str]) -> None:
    assert expected_names([test], {"math": None}) == names


def answering(*replies: Any) -> Link:
    """Return a link to a program that sends these messages, whatever it is sent, and ends."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        for reply in replies:
            theirs.sendall(reply) if isinstance(reply, bytes) else frames.send(theirs, reply)
            theirs.recv(1 << 16)
        theirs.close()

    threading.Thread(target=send, daemon=True).start()
    return Link(ours, 1000)


def spec(*tests: str, each: bool = False) -> dict[str, Any]:
    return {"setup": [""], "tests": list(tests), "entry": "f", "each": each}


def test_counts() -> None:
    link = answering({"value": 1}, {"value": 2})
    assert judge(spec("assert f(0) == 1", "assert f(0) == 2"), link) == {"passed": 2, "total": 2}


@pytest.mark.parametrize(
    "reply",
    [
        {"value": ["l", 5]},
        {"value": {}},
        {"other": 5},
        [],
        None,
        {"error": 5},
        b"\xff" * 8,
        b"\0" * 7 + b"\x02[]",
        b"\0" * 6 + b"\x03\xe8" + b"[" * 1000,
        b"\0\0",
    ],
    ids=repr,
)
def test_no_test_passes_after_nonsense(reply: Any) -> None:
    test = "try:\n    f(0)\nexcept BaseException:\n    pass"
    verdict = judge(spec(test, test, each=True), answering(reply))
    assert verdict == {"passed": 0, "total": 1, "lost": True}


@pytest.mark.parametrize("name", ["StopIteration", "GeneratorExit", "SystemExit", "open", "Nope"])
def test_an_exception_that_would_end_a_loop_is_another_one(name: str) -> None:
    test = "assert all(x == 1 for x in map(f, [1, 2]))"
    verdict = judge(spec(test), answering({"error": [name, "BaseException"], "text": "x"}))
    assert verdict == {"passed": 0, "total": 1}
    with pytest.raises(RuntimeError):
        answering({"error": [name]}).ask({})


def test_an_exception_is_the_nearest_built_in_one() -> None:
    with pytest.raises(KeyError, match="x"):
        answering({"error": ["Mine", "KeyError", "LookupError"], "text": "x"}).ask({})


def test_an_object_of_the_program_decides_nothing() -> None:
    remote = Remote(answering(), 3)
    for use in (
        bool,
        hash,
        len,
        iter,
        lambda r: r == 1,
        lambda r: r != 1,
        lambda r: r in [1],
        lambda r: r < 1,
    ):
        with pytest.raises(TypeError):
            use(remote)
    with pytest.raises(LostError):
        remote(1)
