"""SVAMP (Patel et al. 2021): 1,000 word problems of one or two steps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.checks import seeds, share_or_count
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.tables import cell, plain_number, split_rows, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

HUB_ID = "ChilleD/SVAMP"


class Svamp(PromptDataModule):
    """Word problems with a number as their answer; the rows of all files are pooled and split anew.

    The solution that a supervised warm-up imitates is the row's equation, `76 - 25 = 51`, where it
    has one.

    Args:
        path: `SVAMP.json` or its folder. None: `$LIGHTNING_MPO_DATA/svamp/SVAMP.json` if that
            variable is set, else the hub.
        validation_share: below 1 a share of the problems, from 1 on their number.
        split_seed: seed of the split, which the order of the rows and `seed` do not touch.
        kwargs: as for `PromptDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        validation_share: float = 0.3,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        share_or_count(type(self).__name__, "prompts", validation_share=validation_share)
        seeds(type(self).__name__, split_seed=split_seed)
        self.path = path
        self.validation_share = validation_share
        self.split_seed = split_seed

    def load(self) -> Splits:
        """Read, tidy and split the rows.

        Raises:
            UserError: a missing or broken file; a row without `Body`, `Question` or `Answer`.
        """
        file = self._file()
        source, table = (HUB_ID, _from_hub()) if file is None else (str(file), _from_file(file))
        rows = [
            _row(line, f"row {number} of {source}") for number, line in enumerate(table, start=1)
        ]
        return split_rows(rows, self.validation_share, self.split_seed)

    def _file(self) -> Path | None:
        folder = os.environ.get("LIGHTNING_MPO_DATA")
        if self.path is None and not folder:
            return None
        path = Path(self.path or f"{folder}/svamp").expanduser()
        path = path / "SVAMP.json" if path.is_dir() else path
        if not path.is_file():
            source = "`data.path`" if self.path else "the environment variable LIGHTNING_MPO_DATA"
            raise UserError(
                f"there is no SVAMP.json at {path}, which {source} names; correct it, or leave it "
                "out for the hub's copy"
            )
        return path


def _from_file(file: Path) -> Sequence[Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(table, list):
        raise UserError(f"{file} must hold a list of rows, got {type(table).__name__}")
    return table


def _from_hub() -> Sequence[Any]:
    import datasets

    try:
        splits = datasets.load_dataset(HUB_ID)
    except Exception as error:  # offline, renamed, refused: many types
        raise UserError(
            f"cannot load {HUB_ID} from the hub ({type(error).__name__}); set `data.path` to a "
            "local SVAMP.json"
        ) from error
    return [row for name in sorted(splits) for row in splits[name]]


def _row(line: Any, where: str) -> PromptRow:
    prompt = _join(text_cell(line, "Body", where), text_cell(line, "Question", where))
    answer = plain_number(cell(line, "Answer", where), f"{where}: 'Answer'")
    solution = (
        None
        if line.get("Equation") is None
        else f"{_plain(text_cell(line, 'Equation', where))} = {answer}"
    )
    return PromptRow(
        prompt,
        answer,
        solution,
        extra={key: line[key] for key in line if key not in ("Body", "Question")},
        where=where,
    )


def _plain(equation: str) -> str:
    """Write an equation without its outer brackets, trailing zeros and spaces inside brackets.

    Example:
        >>> _plain("( ( 4.0 - 2.5 ) + 30.0 )")
        '(4 - 2.5) + 30'
    """
    text = re.sub(
        r"\d+\.\d+", lambda number: plain_number(number[0], "an equation"), equation.strip()
    )
    return re.sub(r"^\((.*)\)$", r"\1", text.replace("( ", "(").replace(" )", ")"))


def _join(body: str, question: str) -> str:
    """Make one text of two. A body without a full stop is half a sentence ("If there are 6 girls").

    Example:
        >>> _join("Dan had $ 3 left. If he had $ 4 at the start", "How much was it?")
        'Dan had $3 left. If he had $4 at the start, how much was it?'
    """
    body, question = body.strip(), question.strip()
    if body and body[-1] not in ".?!,":
        clause = re.split(r"[.?!]\s", body)[-1]
        body += "," if clause.startswith("If ") else "."
    if body.endswith(","):
        question = question[:1].lower() + question[1:]
    text = re.sub(r"\s+", " ", f"{body} {question}").strip()
    return re.sub(r"\$ (?=\d)", "$", re.sub(r" (?=[.,?!])", "", text))
