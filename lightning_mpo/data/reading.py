"""Reads files of JSON rows; a mistake in one names its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError

PANDAS = (
    "python -c \"import pandas; pandas.read_KIND('NAME').to_json('rows.jsonl', "
    "orient='records', lines=True)\""
)
UTF_16 = "iconv -f UTF-16 -t UTF-8 NAME > rows.jsonl"
FORMATS = {
    b"PAR1": ("Parquet", PANDAS.replace("KIND", "parquet")),
    b"ARROW1": ("an Arrow file", PANDAS.replace("KIND", "feather")),
    b"PK\x03\x04": ("a zip archive", "unzip NAME"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d NAME"),
    b"BZh": ("bzip2", "bunzip2 NAME"),
    b"\xfd7zXZ": ("xz", "unxz NAME"),
    b"\x1f\x8b": ("packed twice", "gunzip NAME"),
    b"SQLite format": ("SQLite", "write its rows to rows.jsonl, one JSON object a line"),
    b"\x80": ("binary", "write its rows to rows.jsonl, one JSON object a line"),
    b"\xff\xfe\0\0": ("UTF-32", UTF_16.replace("16", "32")),
    b"\0\0\xfe\xff": ("UTF-32", UTF_16.replace("16", "32")),
    b"\xff\xfe": ("UTF-16", UTF_16),
    b"\xfe\xff": ("UTF-16", UTF_16),
}
"""First bytes of other formats, their names, and commands that convert them to JSON lines."""


class WrittenFloat(float):
    """A float that keeps the digits of its file."""

    digits: str

    def __new__(cls, digits: str) -> WrittenFloat:
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return WrittenFloat, (self.digits,)


def read_rows(name: str, option: str = "", example: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file with one JSON object a line, or with one JSON list.

    A gzip file is unpacked.

    Args:
        name: path of the file.
        option: the option that holds the path, for messages; empty: none.
        example: an example of a valid line, for messages; empty: none.

    Raises:
        UserError: the file is missing, cannot be read, or is not JSON; the message names the line.
    """
    # read the file and cut it into lines
    text = _text(name, _bytes(name, option), example)
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
                hint = _hint(name, lines, number)
                raise UserError(f"{place} is not JSON{example}: {_reason(error)}{hint}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON{example}: {_reason(error)}") from error


def _bytes(name: str, option: str) -> bytes:
    """Return the bytes of a file, unpacked.

    Args:
        name: path of the file.
        option: the option that holds the path, for messages; empty: none.
    """
    # refuse paths that are no file
    prefix = f"`{option}`: " if option else ""
    if not name.strip() or "\0" in name:
        raise UserError(f"{prefix}{name[:200]!r} is not a file name")
    try:
        file = Path(name).expanduser()
        if file.is_dir():
            raise UserError(f"{prefix}{name} is a folder; name a file with one JSON object a line")
        if not file.exists():
            written = repr(name) if option else name
            raise UserError(f"{prefix}there is no file {written} (seen from {Path.cwd()})")
        if not file.is_file():
            raise UserError(f"{prefix}{name} is not a regular file; write the rows to one")
        data = file.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{prefix}{name[:200]!r} cannot be read: {reason}") from error
    # unpack gzip
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{name} is gzip and cannot be unpacked ({error}); is it complete?"
        ) from error


def _text(name: str, data: bytes, example: str) -> str:
    """Return the text of a file; other formats and encodings are refused with a conversion."""
    for start, (kind, command) in FORMATS.items():
        if data.startswith(start):
            command = command.replace("NAME", name)
            raise UserError(f"{name} is {kind}, not JSON lines; convert it: {command}")
    if b"\0" in data:
        raise UserError(
            f"line {data.count(10, 0, data.index(0)) + 1} of {name} is not JSON{example}: it holds "
            f"a zero byte; if the file is UTF-16, convert it: {UTF_16.replace('NAME', name)}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        begin = data.rfind(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {data.count(10, 0, begin) + 1} of {name} is not JSON{example} in UTF-8: byte "
            f"0x{data[error.start]:02x} at column {error.start - begin + 1}; if it is Latin-1, "
            f"convert it: iconv -f LATIN1 -t UTF-8 {name} > rows.jsonl"
        ) from error


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


def _hint(name: str, lines: list[str], number: int) -> str:
    """Guess why a line is not JSON."""
    line, rest = lines[number - 1], lines[number:]
    if (
        number == 1
        and line[0] not in "{["
        and (any(mark in line for mark in ",;\t") or Path(name).suffix in (".csv", ".tsv"))
    ):
        return (
            "; if the file is CSV, convert it: "
            f"{PANDAS.replace('KIND', 'csv').replace('NAME', name)}"
        )
    if line.strip() == "{" and any(part.strip() for part in rest):
        return "; an object must be on one line"
    if number > 1 and not any(part.strip() for part in rest) and line.strip()[-1] != "}":
        return "; the file ends within this line: is it complete?"
    return ""
