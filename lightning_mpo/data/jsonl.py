"""Any data set with one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_mpo.checks import seeds, share_or_count
from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.data.tables import cell, split_rows, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


class JsonLines(PromptDataModule):
    """Prompts and targets from JSON lines; columns that are not named here reach the rewards as `Completion.row`.

    Args:
        train: the file to train on.
        validation: the file to validate on. None: a part of `train` is held out.
        prompt: column of the prompt.
        target: column of the right answer; numbers are written as text.
        solution: column of a solution to imitate, if there is one.
        validation_share: of `train`, without a validation file: below 1 a share of the prompts, from 1 on their number.
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
            UserError: a missing or broken file, a row without a named column, a prompt that stands in both files.
        """
        rows = self._read(self.train)
        if self.validation is None:
            return split_rows(rows, self.validation_share, self.split_seed)
        held_out = self._read(self.validation)
        shared = {row.prompt for row in rows} & {row.prompt for row in held_out}
        if shared:
            raise UserError(
                f"{len(shared)} prompts stand both in {self.train} and in {self.validation}, such as "
                f"{min(shared)[:60]!r}; take them out of one"
            )
        return Splits(rows, held_out)

    def _read(self, name: str) -> list[PromptRow]:
        file = Path(name).expanduser()
        if not file.is_file():
            raise UserError(f"there is no file {name} (seen from {Path.cwd()})")
        rows = []
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(self._row(_parse(line, f"line {number} of {name}"), f"line {number} of {name}"))
        return rows

    def _row(self, line: Any, where: str) -> PromptRow:
        target = cell(line, self.target, where)
        return PromptRow(
            prompt=text_cell(line, self.prompt, where),
            target=target if isinstance(target, str) else json.dumps(target),
            solution=text_cell(line, self.solution, where) if self.solution else None,
            extra={key: line[key] for key in line if key not in (self.prompt, self.target, self.solution)},
        )


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error
