"""Values between a program and its tests: built-in types alone arrive, whatever is sent."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mpo.rewards.sandbox.inside.values import decode, encode

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


def crossing(value: Any) -> Any:
    sent: list[Any] = []
    data = encode(value, lambda thing: sent.append(thing) or len(sent) - 1)
    return decode(json.loads(json.dumps(data)), lambda number: sent[number])


@given(PLAIN)
def test_plain_data_arrive(value: Any) -> None:
    assert crossing(value) == value


@pytest.mark.parametrize(
    "value",
    [
        2**53,
        -(2**200),
        {1, 2},
        frozenset({(1, "a")}),
        bytearray(b"x"),
        1 + 2j,
        range(1, 9, 2),
        -0.0,
    ],
    ids=repr,
)
def test_other_built_in_types_arrive(value: Any) -> None:
    assert crossing(value) == value
    assert type(crossing(value)) is type(value)
    assert math.copysign(1, crossing(-0.0)) == -1


class Liar:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize("kind", [int, float, str, list, tuple, dict, set, frozenset, bytes])
def test_a_subclass_does_not_survive(kind: type) -> None:
    value = type("Liar", (Liar, kind), {})()
    arrived = crossing([value])[0]
    assert type(arrived) is kind
    assert arrived == kind()


def test_relatives_of_built_in_types_arrive_as_these() -> None:
    assert type(crossing(collections.Counter("aab"))) is dict
    assert type(crossing(collections.namedtuple("P", "x y")(1, 2))) is tuple
    assert list(crossing(iter([1, 2]))) == [1, 2]


def test_other_objects_are_sent_as_numbers() -> None:
    thing = Liar()
    assert encode([thing], lambda _: 5) == ["l", [["o", 5]]]
    assert crossing(thing) is thing


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        ["x", 1],
        ["l", 5],
        ["l"],
        ["i", 5],
        ["c", "1", 2],
        ["r", [1, 2]],
        ["d", [[1]]],
        ["b", 1],
    ],
    ids=repr,
)
def test_forged_data_are_refused(data: Any) -> None:
    with pytest.raises(ValueError):
        decode(data, lambda number: number)
