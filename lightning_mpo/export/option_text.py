"""Options of a configuration as one line of text for a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lightning_mpo.export.origin import short
from lightning_mpo.recipes.tree import is_list_of_classes

CLASS_PATH = r"\w+(\.[a-z_]\w*)*\.[A-Z]\w*"


def option_text(value: Any) -> str:
    """Write an option in one line, without the folders of the machine that the run was on.

    >>> option_text({"class_path": "lightning_mpo.TopK", "init_args": {"k": 8}})
    'TopK(k 8)'
    """
    if isinstance(value, dict):
        is_class = "class_path" in value
        arguments = (value.get("init_args") or {}) if is_class else value
        given = {key: part for key, part in arguments.items() if part not in (None, "")}
        inner = ", ".join(f"{key} {option_text(part)}" for key, part in given.items())
        if not is_class:
            return f"({inner})"
        return (
            f"{short(value['class_path'])}({inner})" if inner else str(short(value["class_path"]))
        )
    if isinstance(value, str):
        if "/" in value and Path(value).is_absolute():
            return Path(value).name
        text = short(value) if re.fullmatch(CLASS_PATH, value) else value
        return re.sub(r"\s+", " ", text).strip()
    if is_list_of_classes(value):
        return ", ".join(map(option_text, value))
    return json.dumps(value)
