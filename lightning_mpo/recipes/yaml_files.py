"""Reads a configuration file, and refuses mistakes that YAML accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_mpo.errors import UserError

LARGEST = 2**20
"""Bytes of the largest configuration file that is read."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML takes the last one, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise UserError(
                        f"gives `{key.value}` twice, in lines {seen[key.value]} and {line}"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the options of a configuration file.

    Raises:
        UserError: the file is not UTF-8 text, too large, no valid YAML, no mapping, or gives a key
            twice.
    """
    # parse
    if path.stat().st_size > LARGEST:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, which no configuration has; is it another "
            "file?"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        tab = "; indent with spaces, not with tabs" if "'\\t'" in reason else ""
        raise UserError(f"{path} is not valid YAML: {reason[:300]}{tab}") from error
    # check the content
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path} must hold a mapping of options, got {kind}")
    _check_includes(path, content.get("include"))
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{path} has the key {key!r}, which is not text: options have names")
    return content


def _check_includes(path: Path, names: Any) -> None:
    names = [names] if isinstance(names, str) else names
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    ):
        raise UserError(
            f"`include:` of {path} must be the name of a file, or a list of names, got {names!r}"
        )
