"""The identity of data. Two runs with equal identities train on the same prompts in one order."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning_mpo.data.curriculum import Curriculum
from lightning_mpo.types import Splits

IDENTIFYING = (
    *("seed", "order", "overlong", "max_prompt_tokens", "validation_prompts"),
    *("chat_template", "instruction", "suffix", "system", "template_arguments", "control_tokens"),
)
"""Options of a `PromptDataModule` that are part of its identity."""


def digest_of(splits: Splits) -> str:
    """Return a digest of all rows in their order, with the columns that rewards read."""
    digest = hashlib.sha256()
    for rows in (splits.train, splits.validation):
        for row in rows:
            messages = [dict(message) for message in row.messages]
            content = [row.prompt, row.target, row.solution, messages, dict(row.extra)]
            content += [row.opening] if row.opening else []
            digest.update(json.dumps(content, default=str).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def describe_rows(data: str, splits: Splits, digest: str) -> dict[str, Any]:
    """Return class of the data, numbers of rows and digest, for a comparison of runs."""
    rows = {"train": len(splits.train), "validation": len(splits.validation)}
    return {"data": data, "rows": rows, "digest": digest}


def describe_curriculum(curriculum: Curriculum | None) -> dict[str, Any] | None:
    """Return class and options of a curriculum, without its state; None: there is none."""
    if curriculum is None:
        return None
    options = {name: value for name, value in vars(curriculum).items() if name[0] != "_"}
    return {"class": type(curriculum).__name__} | options
