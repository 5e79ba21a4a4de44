"""Any data set with one JSON object a line."""

from __future__ import annotations

from typing import Any

from lightning_mpo.checks import seeds, share_or_count
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.reading import read_rows
from lightning_mpo.data.rows import check_columns, prompt_row
from lightning_mpo.data.tables import shared_prompts, split_rows
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits


class JsonLines(PromptDataModule):
    """Prompts and targets from JSON lines; rewards get all columns by their names in the file.

    A file holds one JSON object a line, or one JSON list of objects; gzip is unpacked. The prompt
    is text, or a list of messages `{"role": …, "content": …}` for the chat template; a row without
    the prompt's column may have `messages`. A last message of the assistant is the row's solution.
    Other options are those of `PromptDataModule`: `seed`, `order`, `chat_template`, `system`,
    `instruction`, `suffix`, `template_arguments`, `control_tokens`, `max_prompt_tokens`,
    `overlong`, `validation_prompts` and `validation_batch_size`.

    Args:
        train: the file to train on.
        validation: the file to validate on. None: a part of `train` is held out.
        prompt: column of the prompt.
        target: column of the right answer: text (surrounding white space is dropped), true, false,
            or a number, which is written plainly (1e-07 as 0.0000001, 72.0 as 72).
        solution: column of a solution to imitate; None: none.
        validation_share: part of `train` to hold out if there is no validation file: below 1 a
            share of the prompts, from 1 on their number.
        split_seed: seed of that split.
        kwargs: as for `PromptDataModule`.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        prompt: str = "prompt",
        target: str = "target",
        solution: str | None = None,
        validation_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        share_or_count(type(self).__name__, "prompts", validation_share=validation_share)
        seeds(type(self).__name__, split_seed=split_seed)
        check_columns("data", prompt=prompt, target=target, solution=solution)
        self.train = train
        self.validation = validation
        self.prompt = prompt
        self.target = target
        self.solution = solution
        self.validation_share = validation_share
        self.split_seed = split_seed

    def load(self) -> Splits:
        """Read both files.

        Raises:
            UserError: a file is missing or broken, a row lacks a column, or a prompt is in both
                files.
        """
        rows = self._read(self.train)
        if self.validation is None:
            return split_rows(rows, self.validation_share, self.split_seed)
        held_out = self._read(self.validation)
        shared = shared_prompts(rows, held_out)
        if shared:
            first = min(shared, key=lambda row: row.prompt)
            raise UserError(
                f"{len(shared)} prompts are both in {self.train} and in {self.validation}, such as "
                f"{first.prompt[:60]!r} ({first.where}; white space does not count); take them out "
                "of one"
            )
        return Splits(rows, held_out)

    def _read(self, name: str) -> list[PromptRow]:
        return [
            prompt_row(row, where, self.prompt, self.target, self.solution)
            for where, row in read_rows(name)
        ]
