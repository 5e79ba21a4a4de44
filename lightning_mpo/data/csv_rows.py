"""CSV files: text cells under the names of a header."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mpo.data.files import MARK, decoded, opened
from lightning_mpo.errors import UserError

SEPARATORS = ",;\t|"
LONGEST_CELL = 2**31 - 1
"""Characters of a cell; the limit of `csv` is 131,072 by default."""


def is_csv_name(name: str) -> bool:
    """Return whether a file is CSV by the suffix of its name."""
    return not {".csv", ".tsv"}.isdisjoint(Path(name.lower()).suffixes)


def separator_of(name: str, start: bytes) -> str | None:
    """Return the character between cells; None: the file is not CSV.

    The suffix of the name decides, or a first line that is not JSON and has a separator.

    Args:
        name: path of the file.
        start: its first bytes, unpacked.
    """
    if ".tsv" in Path(name.lower()).suffixes:
        return "\t"
    lines = start.removeprefix(MARK).decode("utf-8", errors="replace").lstrip().splitlines()
    header = lines[0] if lines else ""
    counts = {separator: header.count(separator) for separator in SEPARATORS}
    best = max(SEPARATORS, key=lambda separator: counts[separator])
    if is_csv_name(name):
        return best if counts[best] else ","
    is_json = header[:1] in ("{", "[", "") or re.search(r'"\s*:', header)
    return None if is_json or not counts[best] else best


def csv_rows(name: str, separator: str, option: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a CSV file in UTF-8; each cell is text, and an empty one is null.

    A column without a name, such as the index that pandas writes, is left out.

    Args:
        name: path of the file.
        separator: character between cells.
        option: the option that holds the path, for messages; empty: none.

    Raises:
        UserError: the file is not CSV in UTF-8, or a row has another number of cells than the
            header; the message names the line.
    """
    csv.field_size_limit(LONGEST_CELL)
    with opened(name, option) as file:
        lines = (decoded(line, number, name, "CSV") for number, line in enumerate(file, start=1))
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            # the header
            header = next(reader, [])
            repeated = [column for column in header if column and header.count(column) > 1]
            if repeated:
                raise UserError(f"{name} has the column {repeated[0][:60]!r} twice")
            # the rows; a cell may hold line breaks
            begin = reader.line_num + 1
            for cells in reader:
                place, begin = f"line {begin} of {name}", reader.line_num + 1
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{place} has {len(cells)} cells, and the header has {len(header)}; write "
                        f'a text with {separator!r} or a line break in double quotes ("…")'
                    )
                if cells:
                    columns = zip(header, cells, strict=True)
                    yield place, {column: cell or None for column, cell in columns if column}
        except csv.Error as error:
            raise UserError(f"line {reader.line_num} of {name} is not CSV: {error}") from error
