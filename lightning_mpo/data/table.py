"""Tables from anywhere: files of any usual format, or the Hugging Face hub."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lightning_mpo.checks import at_least
from lightning_mpo.data.columns import Columns
from lightning_mpo.data.hub import Hub
from lightning_mpo.data.rows import describe
from lightning_mpo.data.source import Files, Source, TableSource
from lightning_mpo.data.tables import cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits


class Table(TableSource):
    """Prompts and targets from a table: Parquet, CSV, JSON, JSON lines, or a data set of the hub.

    The content of a file decides its format; gzip is unpacked. Rewards get all columns by their
    names in the table. `prompt`, `target` and `solution` are names of columns, or Jinja templates:
    a text with `{{` or `{%` is a template. The column of the prompt may hold text, or a list of
    messages `{"role": …, "content": …}` for the chat template. A row without that column may have
    `messages`. A last message of the assistant is the row's solution.

    A subclass may override `row(record, where)`, which makes a `PromptRow` of each row.

    Args:
        train: file to train on, or several; with `hub` a split, such as `train`.
        validation: file or split to validate on. None: a part of `train` is held out.
        prompt: column or template of the prompt.
        target: column or template of the right answer: text, true, false, or a number. White space
            around a text is dropped. A number is written plainly (1e-07 as 0.0000001, 72.0 as 72).
            None: no answer is known.
        solution: column or template of a solution to imitate; None: none.
        few_shot: number of examples before each prompt, each with its solution: the first training
            rows, which are left out of training. They are turns of a chat if `chat_template`, else
            text. None: none.
        id: column that may hold each value only once; None: not checked.
        kwargs: as for `TableSource` (`hub`, `subset`, `streaming`, `max_rows`, `validation_share`,
            `split_seed`) and for `PromptDataModule`.

    Raises:
        UserError: options are out of range, or a template has a syntax error.

    Example:
        >>> table = Table("train.parquet", prompt="Question: {{ question }}", target="answer")
        >>> table.row({"question": "1 + 1?", "answer": 2}, "row 1").prompt
        'Question: 1 + 1?'
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        prompt: str = "prompt",
        target: str | None = "target",
        solution: str | None = None,
        few_shot: int | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, **kwargs)
        at_least(type(self).__name__, 1, few_shot=few_shot)
        self.columns = Columns(prompt, target, solution)
        self.prompt, self.target, self.solution = prompt, target, solution
        self.few_shot = few_shot
        self.id = id
        self._places: dict[Any, str] = {}

    @property
    def judged(self) -> bool:
        return self.target is not None

    def row(self, record: Any, where: str) -> PromptRow | None:
        """Return the `PromptRow` of a row; None: it is left out.

        Args:
            record: values by the names of their columns.
            where: place of the row, for messages.

        Raises:
            UserError: a column is missing, null, empty or of another type.
        """
        return self.columns.row(record, where)

    def load(self) -> Splits:
        """Read the rows, and set the examples of `few_shot` apart.

        Raises:
            UserError: a source is missing or damaged, a row cannot be used, an id is there twice,
                or there are too few rows for `few_shot`.
        """
        self._places = {}
        splits = super().load()
        if self.few_shot is None or not splits.train:
            return splits
        self.shots, train = splits.train[: self.few_shot], splits.train[self.few_shot :]
        if not train:
            raise UserError(
                f"`data.few_shot` = {self.few_shot} takes all {len(splits.train)} rows to train "
                "on; lower it"
            )
        for shot in self.shots:
            if shot.solution is None:
                raise UserError(
                    f"{describe(shot)} has no solution for `data.few_shot`; name its column in "
                    "`data.solution`"
                )
        return Splits(train, splits.validation)

    def _row(self, record: Any, where: str) -> PromptRow | None:
        if self.id is not None:
            value = str(cell(record, self.id, where))
            first = self._places.setdefault(value, where)
            if first != where:
                raise UserError(
                    f"{where}: {self.id!r} is {value[:60]!r}, as in {first}; ids must differ"
                )
        return self.row(record, where)


class PublicTable(Table):
    """A public data set: rows and splits of the hub, or files of them in their public form.

    A subclass sets constants. Where columns or templates are not enough, it overrides
    `row(record, where)`, which returns a `PromptRow`, or None for a row that is left out.
    `lightning_mpo.data.tables` has `text_cell`, `plain_number` and their like for it. `FOLDER` is
    the folder of its files in `$LIGHTNING_MPO_DATA`. `TRAIN` and `VALIDATION` are splits of the
    hub, each with the name of the file that holds the same rows. `VALIDATION = None` holds a part
    of the training rows out. `PROMPT`, `TARGET` and `SOLUTION` are columns or templates.

    Args:
        path: folder with the files, or the one file. None: the folder in `$LIGHTNING_MPO_DATA` if
            it is there, else the hub.
        kwargs: as for `Table`, without the source and the columns.

    Raises:
        UserError: options are out of range.

    Example:
        >>> class Gsm8k(PublicTable):
        ...     FOLDER = "gsm8k"
        ...     TRAIN = Hub("openai/gsm8k", "train", "main", file="train.jsonl")
        ...     VALIDATION = Hub("openai/gsm8k", "test", "main", file="test.jsonl")
        ...     PROMPT, SOLUTION = "question", "answer"
        ...     TARGET = "{{ answer.split('####')[-1] | replace(',', '') }}"
        >>> record = {"question": "1 + 1?", "answer": "It is 2.\\n#### 2"}
        >>> Gsm8k().row(record, "row 1").target
        '2'
    """

    FOLDER: ClassVar[str] = ""

    @property
    @abstractmethod
    def TRAIN(self) -> Hub:
        """The rows to train on."""

    VALIDATION: ClassVar[Hub | None] = None
    PROMPT: ClassVar[str] = "prompt"
    TARGET: ClassVar[str | None] = "target"
    SOLUTION: ClassVar[str | None] = None

    def __init__(self, path: str | None = None, **kwargs: Any) -> None:
        self.path = path
        super().__init__(
            train="",
            validation=None,
            prompt=self.PROMPT,
            target=self.TARGET,
            solution=self.SOLUTION,
            hub=None,
            subset=None,
            **kwargs,
        )

    def sources(self) -> tuple[Source, Source | None]:
        """Return the sources of the rows to train and to validate on; None: a part is held out."""
        held_out = None if self.VALIDATION is None else self._place(self.VALIDATION)
        return self._place(self.TRAIN), held_out

    def _place(self, split: Hub) -> Source:
        """Return a split of the hub, or the file with its rows."""
        folder = os.environ.get("LIGHTNING_MPO_DATA")
        if self.path is not None:
            path = Path(self.path).expanduser()
            if self.VALIDATION is not None and not path.is_dir():
                raise UserError(
                    f"`data.path` must be the folder with {self.TRAIN.file} and "
                    f"{self.VALIDATION.file}, got {self.path!r}"
                )
        elif folder and Path(folder, self.FOLDER).is_dir():
            path = Path(folder, self.FOLDER)
        else:
            return replace(split, streaming=self.streaming)
        return Files((str(path / split.file if path.is_dir() else path),))
