"""Data that are made of other data, and the options that they take over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.curriculum import Curriculum
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

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


class OverData(PromptDataModule):
    """Data that are made of other data. A subclass implements `load`.

    Args:
        base: the data. Its options on texts and lengths count.
        seed: of the order of the training prompts.
        curriculum: as for `PromptDataModule`.

    Raises:
        UserError: `base` has an option that belongs to this class.
    """

    def __init__(
        self, base: PromptDataModule, seed: int = 0, curriculum: Curriculum | None = None
    ) -> None:
        super().__init__(**options_of(base, type(self).__name__), seed=seed, curriculum=curriculum)
        self.base = base
        self.searches_ngrams = base.searches_ngrams

    @property
    def benchmark_rows(self) -> Sequence[PromptRow]:
        return self.base.benchmark_rows

    @property
    def judged(self) -> bool:
        return self.base.judged

    def prepare_data(self) -> None:
        self.base.prepare_data()

    def check_response(self, max_new_tokens: int) -> None:
        self.base.check_response(max_new_tokens)
