"""Prompts to complete, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.data.tables import cell, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


class PromptFile(PromptDataModule):
    """JSON lines, each with a prompt, for `predict`; other columns are copied into what is written.

    Args:
        path: the file.
        prompt: column of the prompt.
        target: column of the right answer. None: completions are not judged, and no reward is written.
        chat_template: apply the tokenizer's chat template. None: where it has one.
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
        self._template = chat_template
        self.path = path
        self.prompt = prompt
        self.target = target

    @property
    def judged(self) -> bool:
        return self.target is not None

    def connect(self, tokenizer: Any) -> None:
        if self._template is None:
            self.chat_template = bool(getattr(tokenizer, "chat_template", None))
        super().connect(tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if stage not in (None, "predict"):
            raise UserError(f"`PromptFile` is for `predict`, not for `{stage}`: train and validate on `JsonLines`")
        super().setup(stage)

    def load(self) -> Splits:
        """Read the file.

        Raises:
            UserError: there is no such file, it is empty, or a line, which is named, is no JSON object with a prompt.
        """
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UserError(f"`data.path`: there is no file {self.path!r} (seen from {Path.cwd()})")
        rows = []
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(self._row(line, f"line {number} of {self.path}"))
        if not rows:
            raise UserError(f"`data.path` {self.path!r} holds no prompt; write one JSON object a line")
        return Splits(rows, rows)

    def _row(self, line: bytes, where: str) -> PromptRow:
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of the encoding as well
            raise UserError(f'{where} is no JSON, such as {{"prompt": "…"}}: {error}') from error
        prompt = text_cell(row, self.prompt, where)
        if not prompt:
            raise UserError(f"{where}: {self.prompt!r} is empty; a completion needs something to stand behind")
        target = "" if self.target is None else cell(row, self.target, where)
        return PromptRow(
            prompt=prompt,
            target=target if isinstance(target, str) else json.dumps(target),
            extra={key: row[key] for key in row if key not in (self.prompt, self.target)},
        )
