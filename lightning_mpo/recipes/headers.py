"""Headers of algorithm files: what they say of papers and values, compared with what the files set.

A header is comment lines in front of a file's first key: what the algorithm is, then three fields. A field goes on until
the next one begins.

    # GRPO: token ratios, group-relative advantages, mean over responses.
    # paper: arXiv:2402.03300
    # values: low = high = 0.2 [C, TRL and verl]; no KL [C, TRL and verl; paper: 0.04, REC]
    # confidence: [C] TRL and verl

`values:` is clauses between semicolons, each with its source in brackets. What it says as `name = value` outside of
brackets must agree with the file, and every number of the file must be named: a changed default leaves no stale header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
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
    choices: dict[str, Any]  # by axis, as in the file


def read(path: Path) -> Method:
    """Read an algorithm file and check its header against it.

    Raises:
        UserError: the file has no objective, or no whole header, or one that does not agree with the file.
    """
    content: Any = read_mapping(path)
    text = path.read_text(encoding="utf-8-sig")
    for key in ("model", "init_args", "objective"):
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise UserError(f"{path} sets no `model.init_args.objective`, so it is not an algorithm")
    method = Method(path, _header(path, text), content)
    _check_tags(method)
    _check_values(method)
    return method


def is_number(value: Any) -> bool:
    """Whether a value of YAML is a number; switches are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def word(value: Any) -> str:
    """Write an argument as a header does: numbers short, `${rollout.max_new_tokens}` without its frame."""
    if isinstance(value, str):
        return value.removeprefix("${").removesuffix("}")
    return f"{value:.6g}" if is_number(value) else json.dumps(value)


def tags(text: str) -> list[str]:
    """Return the confidence tags of a text: a bracket begins with one, and may hold others.

    >>> tags("low = 0.2 [P; code: 0.4, C]; form [S, I]")
    ['P', 'C', 'S', 'I']
    """
    return [
        found for bracket in _brackets(text) for found in re.split(r"\W+", bracket) if found in TAGS
    ]


def _brackets(text: str) -> list[str]:
    return re.findall(r"\[([^\]]*)\]", text)


def _header(path: Path, text: str) -> dict[str, str]:
    parts: dict[str, list[str]] = {"": []}
    part = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").strip()
        key, _, rest = line.partition(":")
        if key in FIELDS:
            if key in parts:
                raise UserError(f"{path}: its header gives `{key}:` twice")
            part, line = key, rest.strip()
            parts[part] = []
        parts[part].append(line)
    header = {key: " ".join(lines).strip() for key, lines in parts.items()}
    if not header[""]:
        raise UserError(f"{path} must begin with a comment that says what the algorithm is")
    missing = [f"`# {key}: …`" for key in FIELDS if not header.get(key)]
    if missing:
        raise UserError(
            f"{path}: its header lacks {', '.join(missing)}; where nothing is known, write `ours [I]`"
        )
    return header


def _check_tags(method: Method) -> None:
    clauses = re.split(r";(?![^\[]*\])", method.header["values"])  # semicolons outside of brackets
    for key, text in [
        ("confidence", method.header["confidence"]),
        *(("values", clause.strip()) for clause in clauses),
    ]:
        brackets = _brackets(text)
        if not brackets or any(re.split(r"\W", bracket)[0] not in TAGS for bracket in brackets):
            raise UserError(
                f"{method.path}: `{key}:` needs a source in brackets, which begins with one of {', '.join(TAGS)}; got {text!r}"
            )


def _check_values(method: Method) -> None:
    given = dict(_arguments(method.choices))
    named: set[str] = set()
    for name, said in _statements(method.header["values"]):
        meant = [key for key in given if f".{key}".endswith(f".{name}")]
        if not meant:
            raise UserError(
                f"{method.path}: `values:` says {name} = {said}, but the file sets no `{name}`"
            )
        for key in meant:
            if not _same(said, given[key]):
                raise UserError(
                    f"{method.path}: `values:` says {name} = {said}, but `{key}` is {word(given[key])}"
                )
        named.update(meant)
    for key, value in given.items():
        if is_number(value) and key not in named:
            said = f"{key.rsplit('.', 1)[-1]} = {word(value)} [I]"
            raise UserError(
                f"{method.path}: `values:` must say where `{key}` comes from, such as `{said}`"
            )


def _statements(values: str) -> Iterator[tuple[str, str]]:
    """Yield what is said as `name = value` outside of brackets; `low = high = 0.2` says two things.

    >>> list(_statements("low = high = 0.2 [C; verl: dual = 3]; no KL, k = 16 [I]"))
    [('low', '0.2'), ('high', '0.2'), ('k', '16')]
    """
    for clause in re.split("[;,]", re.sub(r"\[[^\]]*\]", "", values)):
        *names, said = clause.split(" = ")
        for name in names:
            if name.split() and said.split():
                yield name.split()[-1], said.split()[0]


def _arguments(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each argument with its dotted path, without `class_path` and `init_args`."""
    if isinstance(value, dict) and "class_path" in value:
        yield from _arguments(value.get("init_args") or {}, path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _arguments(inner, (*path, str(key)))
    else:
        yield ".".join(path), value


def _same(said: str, value: Any) -> bool:
    if not is_number(value):
        return said == word(value)
    try:
        return float(said) == value
    except ValueError:
        return False
