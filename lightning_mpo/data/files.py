"""Files of rows: their bytes, unpacked, and formats that are refused with a conversion."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lightning_mpo.errors import UserError

PANDAS = (
    "python -c \"import pandas; pandas.read_KIND('NAME').to_json('rows.jsonl', "
    "orient='records', lines=True)\""
)
UTF_16 = "iconv -f UTF-16 -t UTF-8 NAME > rows.KIND"
FORMATS = {
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
"""First bytes of formats that are not read, their names, and commands that convert them."""
GZIP, PARQUET, MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
START = 1 << 16
"""Bytes from which the format of a file is recognised."""


@contextmanager
def opened(name: str, option: str = "") -> Iterator[BinaryIO]:
    """Open a file of rows; gzip is unpacked while it is read.

    Args:
        name: path of the file.
        option: the option that holds the path, for messages; empty: none.

    Raises:
        UserError: there is no such file, or it cannot be read or unpacked.
    """
    prefix = f"`{option}`: " if option else ""
    try:
        path = _checked_path(name, option, prefix)
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as content:
            yield cast(BinaryIO, content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{name} is gzip and cannot be unpacked ({error}); is it complete?"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{prefix}{name[:200]!r} cannot be read: {reason}") from error


def _checked_path(name: str, option: str, prefix: str) -> Path:
    """Return the path of a regular file."""
    if not name.strip() or "\0" in name:
        raise UserError(f"{prefix}{name[:200]!r} is not a file name")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{prefix}{name[:200]!r} cannot be read: {error}") from error
    if path.is_dir():
        raise UserError(f"{prefix}{name} is a folder; name a file of rows, such as rows.parquet")
    if not path.exists():
        written = repr(name) if option else name
        raise UserError(f"{prefix}there is no file {written} (seen from {Path.cwd()})")
    if not path.is_file():
        raise UserError(f"{prefix}{name} is not a regular file; write the rows to one")
    return path


def check_format(name: str, start: bytes, kind: str) -> None:
    """Refuse a file of another format or encoding.

    Args:
        name: path of the file.
        start: its first bytes, unpacked.
        kind: format as which it is read, such as "JSON lines".

    Raises:
        UserError: gives a command that converts the file.
    """
    for mark, (format_name, command) in FORMATS.items():
        if start.startswith(mark):
            command = command.replace("NAME", name).replace("KIND", suffix_of(kind))
            raise UserError(f"{name} is {format_name}, not {kind}; convert it: {command}")


def decoded(line: bytes, number: int, name: str, kind: str) -> str:
    """Return a part of a file as text.

    Args:
        line: the bytes.
        number: their first line in the file.
        name: path of the file.
        kind: format of the file, for messages.

    Raises:
        UserError: they are not UTF-8, or hold a zero byte; the message names the line.
    """
    if b"\0" in line:
        number += line.count(b"\n", 0, line.index(0))
        command = UTF_16.replace("NAME", name).replace("KIND", suffix_of(kind))
        raise UserError(
            f"line {number} of {name} is not {kind}: it holds a zero byte; if the file is UTF-16, "
            f"convert it: {command}"
        )
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        begin = line.rfind(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {number + line.count(10, 0, begin)} of {name} is not {kind} in UTF-8: byte "
            f"0x{line[error.start]:02x} at column {error.start - begin + 1}; if it is Latin-1, "
            f"convert it: iconv -f LATIN1 -t UTF-8 {name} > rows.{suffix_of(kind)}"
        ) from error


def suffix_of(kind: str) -> str:
    """Return the suffix of file names of a format."""
    return "csv" if kind == "CSV" else "jsonl"


def parquet_rows(name: str, option: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a Parquet file, a batch at a time.

    Raises:
        UserError: the file is damaged, or has a column twice.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    with opened(name, option) as file:
        try:
            packed = isinstance(file, gzip.GzipFile)
            table = parquet.ParquetFile(pyarrow.BufferReader(file.read()) if packed else file)
            columns = table.schema_arrow.names
            repeated = [column for column in columns if columns.count(column) > 1]
            if repeated:
                raise UserError(f"{name} has the column {repeated[0][:60]!r} twice")
            for batch in table.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {name}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{name} is Parquet and cannot be read behind row {number}: {reason}; is it "
                "complete?"
            ) from error
