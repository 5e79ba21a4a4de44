"""Values between a program and its tests, as JSON: plain data and numbers of objects.

A value arrives as an instance of a built-in type itself. A subclass does not survive, and so none
of its methods does. Other objects stay on the program's side: their number crosses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

ITEMS = 100_000
"""Most items of an iterator that are sent."""
SMALL = 1 << 53


def encode(value: Any, number_of: Callable[[Any], Any]) -> Any:
    """Return a value in terms of JSON.

    Args:
        value: the value.
        number_of: encodes an object that is no plain data.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        plain = int.__add__(value, 0)
        return plain if -SMALL < plain < SMALL else ["i", hex(plain)]
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        pairs = [[encode(k, number_of), encode(v, number_of)] for k, v in dict.items(value)]
        return ["d", pairs]
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "f": frozenset}
    for tag, kind in kinds.items():
        if isinstance(value, kind):
            return [tag, [encode(item, number_of) for item in kind.__iter__(value)]]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "a", value.hex()]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, range):
        return ["r", [encode(n, number_of) for n in (value.start, value.stop, value.step)]]
    if isinstance(value, Iterator):
        return ["n", [encode(item, number_of) for item in itertools.islice(value, ITEMS)]]
    return ["o", number_of(value)]


def decode(data: Any, object_of: Callable[[Any], Any]) -> Any:
    """Return the value of a message.

    Args:
        data: from `encode`, or forged: anything that JSON holds.
        object_of: turns the number of an object into an object.

    Raises:
        ValueError: the data has another form.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no value")
        return data
    match data:
        case ["i", str(digits)]:
            return int(digits, 16)
        case ["d", list(pairs)]:
            return {decode(k, object_of): decode(v, object_of) for k, v in pairs}
        case ["l" | "t" | "s" | "f" | "n" as tag, list(items)]:
            values = [decode(item, object_of) for item in items]
            kinds: dict[str, Callable[[Any], Any]]
            kinds = {"l": list, "t": tuple, "s": set, "f": frozenset, "n": iter}
            return kinds[tag](values)
        case ["b", str(digits)]:
            return bytes.fromhex(digits)
        case ["a", str(digits)]:
            return bytearray.fromhex(digits)
        case ["c", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["r", [_, _, _] as ends]:
            return range(*(decode(end, object_of) for end in ends))
        case ["o", number]:
            return object_of(number)
    raise ValueError("no value")
