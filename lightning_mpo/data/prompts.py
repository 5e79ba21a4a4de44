"""Prompts to complete, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.columns import Columns
from lightning_mpo.data.reading import read_rows
from lightning_mpo.errors import UserError
from lightning_mpo.types import Splits


class PromptFile(PromptDataModule):
    """A file with prompts, for `predict`; other columns are copied to the output.

    Files and prompts are read as `Table` reads them.

    Args:
        path: the file.
        prompt: column or template of the prompt.
        target: column or template of the right answer. None: completions are not judged, and the output has no
            rewards.
        chat_template: apply the tokenizer's chat template. None: if it has one.
        kwargs: as for `PromptDataModule`.
    """

    def __init__(
        self,
        path: str,
        prompt: str = "prompt",
        target: str | None = None,
        chat_template: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(chat_template=bool(chat_template), **kwargs)
        self.columns = Columns(prompt, target)
        self._template = chat_template
        self.path = path
        self.prompt = prompt
        self.target = target

    @property
    def judged(self) -> bool:
        return self.target is not None

    def connect(self, tokenizer: Any, end_tokens: Sequence[int] | None = None) -> None:
        if self._template is None:
            self.chat_template = bool(getattr(tokenizer, "chat_template", None))
        super().connect(tokenizer, end_tokens)

    def setup(self, stage: str | None = None) -> None:
        if stage not in (None, "predict"):
            raise UserError(
                f"`PromptFile` is for `predict`, not for `{stage}`: train and validate on `Table`"
            )
        super().setup(stage)

    def load(self) -> Splits:
        """Read the file.

        Raises:
            UserError: the file is missing or empty, or a line is not a JSON object with a prompt;
                the message names the line.
        """
        example = ', such as {"prompt": "…"}'
        rows = [
            self.columns.row(row, where)
            for where, row in read_rows(self.path, option="data.path", example=example)
        ]
        if not rows:
            raise UserError(
                f"`data.path` {self.path!r} holds no prompt; write one JSON object a line"
            )
        return Splits(rows, rows)
