"""Results of a measurement row by row in a file, so that a command that was stopped continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError


def resume(path: Path, about: Mapping[str, Any], rows: int, batch: int) -> list[dict[str, Any]]:
    """Return the records of an earlier command with the same options; begin the file if there is none.

    Records of a batch that was not finished are taken out of the file. So all batches are those of a
    command that was not stopped.

    Args:
        path: JSON lines; the first one has the options.
        about: the options on which the records depend.
        rows: records of a whole measurement.
        batch: rows that are computed together.

    Raises:
        UserError: the file has results of other options.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about) + "\n")
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    first, *lines = whole.splitlines() or ["null"]
    if json.loads(first) != about:
        raise UserError(f"{str(path)!r} has results of other options; give another --out")
    if len(lines) < rows:
        lines = lines[: len(lines) // batch * batch]
    path.write_text("".join(f"{line}\n" for line in (first, *lines)))
    return [json.loads(line) for line in lines]
