"""Headers of algorithm files: their statements on papers and values, compared with the files.

A header is the comment lines in front of a file's first key: a description of the algorithm, then
three fields. A field goes on until the next one begins.

    # GRPO: token ratios, group-relative advantages, mean over responses.
    # paper: arXiv:2402.03300
    # values: low = high = 0.2 [C, TRL and verl]; no KL [C, TRL and verl; paper: 0.04, REC]
    # confidence: [C] TRL and verl

`values:` consists of clauses between semicolons, each with its source in brackets. A `name = value`
outside of brackets must agree with the file, and every number of the file must be named. A changed
default therefore leaves no stale header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.recipes import with_includes
from lightning_mpo.recipes.tree import options, value_at
from lightning_mpo.recipes.yaml_files import read_mapping

FIELDS = ("paper", "values", "confidence")
TAGS = {
    "P": "read in the paper",
    "C": "read in code",
    "S": "second-hand",
    "I": "inferred, or a choice of ours",
    "V": "checked numerically",
    "N": "looked for and not found",
    "REC": "from memory",
}
"""The only tags of evidence, in every docstring, header and page (docs/algorithms.md 1.1)."""


@dataclass(frozen=True)
class Method:
    """An algorithm file."""

    path: Path
    header: dict[str, str]  # by field; the description stands under ""
    choices: dict[str, Any]  # by axis, of the file laid over those that it includes


def read(path: Path) -> Method:
    """Read an algorithm file and check its header against it.

    Raises:
        UserError: the file has no objective, or its header lacks a field or does not agree with it.
    """
    parts = with_includes(path)
    layers = [value_at(read_mapping(part), "model", "init_args", "objective") for part in parts]
    if not isinstance(layers[-1], dict):
        raise UserError(f"{path} sets no `model.init_args.objective`, so it is not an algorithm")
    header = _header(path, path.read_text(encoding="utf-8-sig"))
    method = Method(path, header, reduce(_overlay, filter(None, layers)))
    _check_tags(method)
    _check_values(method)
    return method


def _overlay(below: Any, above: Any) -> Any:
    """Lay options over others key by key, as the parser does; classes and lists are replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    return below | {key: _overlay(below.get(key), inner) for key, inner in above.items()}


def is_number(value: Any) -> bool:
    """Return whether a value of YAML is a number; a switch is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def word(value: Any) -> str:
    """Write an argument as a header does: a short number, `${…}` without its frame."""
    if isinstance(value, str):
        return value.removeprefix("${").removesuffix("}")
    return f"{value:.6g}" if is_number(value) else json.dumps(value)


def tags(text: str) -> list[str]:
    """Return the confidence tags of a text: a bracket begins with one, and may hold others.

    >>> tags("low = 0.2 [P; code: 0.4, C]; form [S, I]")
    ['P', 'C', 'S', 'I']
    """
    return [
        part for bracket in _brackets(text) for part in re.split(r"\W+", bracket) if part in TAGS
    ]


def _brackets(text: str) -> list[str]:
    return re.findall(r"\[([^\]]*)\]", text)


def _header(path: Path, text: str) -> dict[str, str]:
    """Return the fields of a header; the description stands under ""."""
    # collect the lines of each field
    fields: dict[str, list[str]] = {"": []}
    field = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").strip()
        key, _, rest = line.partition(":")
        if key in FIELDS:
            if key in fields:
                raise UserError(f"{path}: its header gives `{key}:` twice")
            field, line = key, rest.strip()
            fields[field] = []
        fields[field].append(line)
    # all fields must be there
    header = {key: " ".join(lines).strip() for key, lines in fields.items()}
    if not header[""]:
        raise UserError(f"{path} must begin with a comment that says what the algorithm is")
    missing = [f"`# {key}: …`" for key in FIELDS if not header.get(key)]
    if missing:
        raise UserError(
            f"{path}: its header lacks {', '.join(missing)}; where nothing is known, write "
            "`ours [I]`"
        )
    return header


def _check_tags(method: Method) -> None:
    """Check that each clause has a source."""
    clauses = re.split(r";(?![^\[]*\])", method.header["values"])  # semicolons outside of brackets
    for key, text in [
        ("confidence", method.header["confidence"]),
        *(("values", clause.strip()) for clause in clauses),
    ]:
        brackets = _brackets(text)
        if not brackets or any(re.split(r"\W", bracket)[0] not in TAGS for bracket in brackets):
            raise UserError(
                f"{method.path}: `{key}:` needs a source in brackets, which begins with one of "
                f"{', '.join(TAGS)}; got {text!r}"
            )


def _check_values(method: Method) -> None:
    """Compare the header's `name = value` with the file."""
    arguments = {
        path: value for path, value in options(method.choices) if not isinstance(value, dict)
    }
    explained: set[str] = set()
    # each statement of the header agrees with the file
    for name, written in _statements(method.header["values"]):
        matches = [key for key in arguments if f".{key}".endswith(f".{name}")]
        if not matches:
            raise UserError(
                f"{method.path}: `values:` says {name} = {written}, but the file sets no `{name}`"
            )
        for key in matches:
            if not _agrees(written, arguments[key]):
                raise UserError(
                    f"{method.path}: `values:` says {name} = {written}, but `{key}` is "
                    f"{word(arguments[key])}"
                )
        explained.update(matches)
    # the header names each number of the file
    for key, value in arguments.items():
        if is_number(value) and key not in explained:
            example = f"{key.rsplit('.', 1)[-1]} = {word(value)} [I]"
            raise UserError(
                f"{method.path}: `values:` must say where `{key}` comes from, such as `{example}`"
            )


def _statements(values: str) -> Iterator[tuple[str, str]]:
    """Yield each `name = value` outside of brackets; `low = high = 0.2` states two.

    >>> list(_statements("low = high = 0.2 [C; verl: dual = 3]; no KL, k = 16 [I]"))
    [('low', '0.2'), ('high', '0.2'), ('k', '16')]
    """
    for clause in re.split("[;,]", re.sub(r"\[[^\]]*\]", "", values)):
        *names, value = clause.split(" = ")
        for name in names:
            if name.split() and value.split():
                yield name.split()[-1], value.split()[0]


def _agrees(written: str, value: Any) -> bool:
    if not is_number(value):
        return written == word(value)
    try:
        return float(written) == value
    except ValueError:
        return False
