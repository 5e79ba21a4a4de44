"""Reads tables from files or from the hub, and splits them: the base of `Table`."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import islice
from typing import Any

from lightning_mpo.checks import at_least, seeds, share_or_count
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.hub import Hub
from lightning_mpo.data.reading import read_rows
from lightning_mpo.data.tables import shared_prompts, split_rows
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits


@dataclass(frozen=True)
class Files:
    """Files of rows that are read one after the other.

    Args:
        names: paths; `*` and `?` stand for any characters, and such files are sorted by name.
    """

    names: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)

    def download(self) -> None:
        """Do nothing: the files are there."""

    def rows(self, most: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yield (place, row).

        Args:
            most: rows to read, the first ones; None: all.

        Raises:
            UserError: a file is missing or damaged.
        """
        paths = [path for name in self.names for path in self._matches(name)]
        yield from islice((row for path in paths for row in read_rows(path, most=most)), most)

    def _matches(self, name: str) -> list[str]:
        """Return the paths of a pattern; a name without a match stays, for the message."""
        if "*" not in name and "?" not in name:
            return [name]
        return sorted(glob(os.path.expanduser(name))) or [name]


Source = Files | Hub


class TableSource(PromptDataModule):
    """Reads rows to train and to validate on. A subclass makes a `PromptRow` of each in `row`.

    Args:
        train: file to train on, or several; with `hub` a split, such as `train`.
        validation: file or split to validate on. None: a part of `train` is held out.
        hub: id of a data set on the Hugging Face hub; None: `train` and `validation` are files.
        subset: its configuration; None: it has only one.
        streaming: read the hub row by row, up to `max_rows`; nothing is downloaded.
        max_rows: rows to read of each file list or split, the first ones; None: all.
        validation_share: part of `train` to hold out without `validation`: below 1 a share of the
            prompts, from 1 on their number.
        split_seed: seed of that split.
        kwargs: as for `PromptDataModule`.

    Raises:
        UserError: options are out of range, or do not fit each other.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        hub: str | None = None,
        subset: str | None = None,
        streaming: bool = False,
        max_rows: int | None = None,
        validation_share: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # options
        name = type(self).__name__
        at_least(name, 1, max_rows=max_rows)
        share_or_count(name, "prompts", validation_share=validation_share)
        seeds(name, split_seed=split_seed)
        if streaming and max_rows is None:
            raise UserError(
                "`data.streaming` needs `data.max_rows`, as all rows that are read stay in memory"
            )
        if subset is not None and hub is None:
            raise UserError("`data.subset` is a part of `data.hub`; name the data set there")
        if train == [] or validation == []:
            raise UserError(f"`data.{'validation' if train else 'train'}` names no file")
        self.train, self.validation = train, validation
        self.hub, self.subset, self.streaming = hub, subset, streaming
        self.max_rows = max_rows
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.sources()

    @abstractmethod
    def row(self, record: Any, where: str) -> PromptRow | None:
        """Return the `PromptRow` of a row; None: it is left out.

        Args:
            record: values by the names of their columns.
            where: place of the row, for messages.

        Raises:
            UserError: the row cannot be used.
        """

    def sources(self) -> tuple[Source, Source | None]:
        """Return the sources of the rows to train and to validate on; None: a part is held out."""
        held_out = None if self.validation is None else self._source(self.validation)
        return self._source(self.train), held_out

    def _source(self, names: str | Sequence[str]) -> Source:
        """Return the source that `train` or `validation` names."""
        if self.hub is None:
            return Files((names,) if isinstance(names, str) else tuple(names))
        split = names if isinstance(names, str) else "+".join(names)
        return Hub(self.hub, split, self.subset, self.streaming)

    def prepare_data(self) -> None:
        """Download the rows; Lightning calls this once per machine."""
        for source in self.sources():
            if source is not None:
                source.download()

    def load(self) -> Splits:
        """Read the rows.

        Raises:
            UserError: a source is missing, damaged or empty; a row lacks a column; or a prompt is in both
                files, the one to train on and the one to validate on.
        """
        train, validation = self.sources()
        rows = self._read(train, "training rows")
        if validation is None:
            return split_rows(rows, self.validation_share, self.split_seed)
        held_out = self._read(validation, "rows to validate on")
        if self.validation is not None and self.hub is None:
            _check_shared(rows, held_out, f"{train}", f"{validation}")
        return Splits(rows, held_out)

    def _read(self, source: Source, use: str) -> list[PromptRow]:
        """Return the rows of a source; `use` is their name in messages."""
        records = (self._row(record, where) for where, record in source.rows(self.max_rows))
        rows = [row for row in records if row is not None]
        if not rows:
            raise UserError(f"`{type(self).__name__}` found no {use} in {source}")
        return rows

    def _row(self, record: Any, where: str) -> PromptRow | None:
        """Return `row`, after checks that no subclass replaces."""
        return self.row(record, where)


def _check_shared(
    rows: Sequence[PromptRow], held_out: Sequence[PromptRow], train: str, validation: str
) -> None:
    """Refuse prompts that are both in the file to train on and in that to validate on."""
    shared = shared_prompts(rows, held_out)
    if shared:
        first = min(shared, key=lambda row: row.prompt)
        raise UserError(
            f"{len(shared)} prompts are both in {train} and in {validation}, such as "
            f"{first.prompt[:60]!r} ({first.where}; white space does not count); take them out of "
            "one"
        )
