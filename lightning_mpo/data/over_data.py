"""Options of data that are made of other data."""

from __future__ import annotations

from typing import Any

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError

INHERITED = (
    *("chat_template", "instruction", "suffix", "system", "template_arguments", "control_tokens"),
    *("max_prompt_tokens", "validation_prompts", "validation_batch_size", "order"),
)
"""Options that data take over from the data that they are made of."""


def options_of(base: PromptDataModule, owner: str) -> dict[str, Any]:
    """Return the options of texts, lengths and validation of data, for data made of them.

    Prompts over the limit are skipped, as a cut prompt would lose its beginning.

    Args:
        base: the data.
        owner: class that is made of them, for messages.

    Raises:
        UserError: `base` cuts prompts, or has an option that belongs to `owner`.
    """
    if base.overlong == "cut":
        raise UserError(
            f"`{owner}` cannot cut prompts: leave out `base.overlong: cut`; prompts over "
            "`max_prompt_tokens` are skipped"
        )
    if base.curriculum is not None:
        raise UserError(f"`{owner}` draws the rows: move `base.curriculum` to `{owner}.curriculum`")
    return {name: getattr(base, name) for name in INHERITED} | {"overlong": "skip"}
