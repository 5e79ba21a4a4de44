"""Reads files of rows; a mistake in one names its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from lightning_mpo.data.csv_rows import csv_rows, is_csv_name, separator_of
from lightning_mpo.data.files import (
    MARK,
    PARQUET,
    START,
    check_format,
    decoded,
    opened,
    parquet_rows,
)
from lightning_mpo.errors import UserError


class WrittenFloat(float):
    """A float that keeps the digits of its file."""

    digits: str

    def __new__(cls, digits: str) -> WrittenFloat:
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return WrittenFloat, (self.digits,)


def read_rows(
    name: str, option: str = "", example: str = "", most: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file, whose content decides the format.

    It is Parquet, CSV, one JSON object a line, or one JSON list; gzip is unpacked.

    Args:
        name: path of the file.
        option: the option that holds the path, for messages; empty: none.
        example: an example of a valid line of JSON, for messages; empty: none.
        most: rows to read, the first ones; None: all.

    Raises:
        UserError: the file is missing or damaged, or of another format; the message names the line.
    """
    with opened(name, option) as file:
        start = file.read(START)
    if start.startswith(PARQUET):
        rows: Iterator[tuple[str, Any]] = parquet_rows(name, option)
    else:
        check_format(name, start, "CSV" if is_csv_name(name) else "JSON lines")
        separator = separator_of(name, start)
        rows = (
            _json_rows(name, option, example, most)
            if separator is None
            else csv_rows(name, separator, option)
        )
    yield from islice(rows, most)


def _json_rows(name: str, option: str, example: str, most: int | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file of JSON. Arguments are those of `read_rows`."""
    # read the file and cut it into lines
    with opened(name, option) as file:
        text = decoded(_bytes(file, most), 1, name, f"JSON{example}")
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) == 1 and "\r" in text:
        lines = text.split("\r")
    # one JSON list
    table = _list(name, text, lines) if text.lstrip()[:1] == "[" else None
    if table is not None:
        yield from ((f"row {number} of {name}", row) for number, row in enumerate(table, start=1))
        return
    # one JSON object a line
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"line {number} of {name}"
            try:
                yield place, _parse(line)
            except json.JSONDecodeError as error:
                hint = _hint(lines, number)
                raise UserError(f"{place} is not JSON{example}: {_reason(error)}{hint}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON{example}: {_reason(error)}") from error


def _bytes(file: BinaryIO, most: int | None) -> bytes:
    """Return the content of a file of JSON: all, or the first lines if they are enough.

    Args:
        file: the open file.
        most: rows to read; None: all.
    """
    first = next(file, b"")
    if most is None or first.removeprefix(MARK).lstrip()[:1] in (b"[", b""):
        return first + file.read()
    lines, count = [first], 1
    while count < most and (line := next(file, b"")):
        lines.append(line)
        count += bool(line.strip())
    return b"".join(lines)


def _list(name: str, text: str, lines: list[str]) -> list[Any] | None:
    """Parse a file that is one JSON list; None: each line is a list by itself."""
    try:
        return list(_parse(text))
    except (ValueError, RecursionError) as error:
        first = next(line for line in lines if line.strip())
        try:
            _parse(first)
        except (ValueError, RecursionError):
            number = f"line {error.lineno} of " if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{number}{name} is not JSON: {_reason(error)}") from error
        return None


def _parse(text: str) -> Any:
    value = json.loads(
        text, object_pairs_hook=_object, parse_float=WrittenFloat, parse_int=_integer
    )
    if "\\u" in text:
        _refuse_half_characters(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > 4000:  # Python refuses to read longer ones
        raise ValueError(f"a number has {len(digits)} digits; write it as text")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has {repeated[:60]!r} twice")
    return content


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half a character (a lone surrogate)") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _hint(lines: list[str], number: int) -> str:
    """Guess why a line is not JSON."""
    line, rest = lines[number - 1], lines[number:]
    if line.strip() == "{" and any(part.strip() for part in rest):
        return "; an object must be on one line"
    if number > 1 and not any(part.strip() for part in rest) and line.strip()[-1] != "}":
        return "; the file ends within this line: is it complete?"
    return ""
