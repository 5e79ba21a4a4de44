"""Splits of data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning_mpo.errors import UserError


@dataclass(frozen=True)
class Hub:
    """A split of a data set on the Hugging Face hub.

    Args:
        id: of the data set, such as `openai/gsm8k`.
        split: name of the split, or a part of one, such as `train[:1000]`.
        subset: configuration of the data set; None: it has only one.
        streaming: read rows over the network one by one; nothing is downloaded.
        file: name of a file that holds the same rows in the public form of the data set.

    Raises:
        UserError: the id or the split is not valid.
    """

    id: str
    split: str
    subset: str | None = None
    streaming: bool = False
    file: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.id):
            raise UserError(
                f"`data.hub` must be an id of the Hugging Face hub, such as 'openai/gsm8k', got "
                f"{self.id[:200]!r}; leave it out for files"
            )
        if not self.split:
            raise UserError("`data.train` and `data.validation` must name splits of `data.hub`")

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.id, self.subset, self.split)))

    def download(self) -> None:
        """Download the rows into the cache, unless they are streamed.

        Raises:
            UserError: the hub cannot be reached, or has no such split.
        """
        if not self.streaming:
            self._load()

    def rows(self, most: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yield (place, row).

        Args:
            most: rows to read, the first ones; None: all.

        Raises:
            UserError: the hub cannot be reached, or has no such split.
        """
        try:
            for number, row in enumerate(islice(self._load(), most), start=1):
                yield f"row {number} of {self}", row
        except Exception as error:  # the network may fail at each row
            raise self._refusal(error) from error

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.id, self.subset, split=self.split, streaming=self.streaming
            )
        except Exception as error:  # offline, renamed, refused: many types
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        """Return the error with its reason in one line."""
        if isinstance(error, UserError):
            return error
        reason, kind = " ".join(str(error).split()), type(error).__name__
        if kind == "DatasetNotFoundError":
            return UserError(
                f"there is no data set {self.id!r} on the hub, or it needs a login; correct the "
                "id, or run `hf auth login`"
            )
        if isinstance(error, (ConnectionError, TimeoutError)) or "Offline" in reason:
            files = f"set `data.path` to {self.file}" if self.file else "name files in `data.train`"
            return UserError(
                f"cannot load {self} from the hub, which is out of reach ({kind}), and the cache "
                f"has no copy; {files} instead, or download it while there is a network"
            )
        return UserError(f"cannot load {self} from the hub: {reason[:250]} ({kind})")
