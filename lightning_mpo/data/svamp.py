"""SVAMP (Patel et al. 2021): 1,000 word problems of one or two steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_mpo.data.hub import Hub
from lightning_mpo.data.table import PublicTable
from lightning_mpo.data.tables import cell, plain_number, text_cell
from lightning_mpo.types import PromptRow


class Svamp(PublicTable):
    """Word problems with a number as their answer; the rows of all files are pooled and split anew.

    The solution that a supervised warm-up imitates is the row's equation, `76 - 25 = 51`, where it
    has one. The split depends on `split_seed` only, not on the order of the rows or on `seed`.

    Args:
        path: `SVAMP.json` or its folder. None: `$LIGHTNING_MPO_DATA/svamp` if it is there, else the
            hub's `ChilleD/SVAMP`.
        validation_share: below 1 a share of the problems, from 1 on their number.
        kwargs: as for `PublicTable`.
    """

    FOLDER = "svamp"
    TRAIN = Hub("ChilleD/SVAMP", "test+train", file="SVAMP.json")

    def __init__(
        self, path: str | None = None, validation_share: float = 0.3, **kwargs: Any
    ) -> None:
        super().__init__(path, validation_share=validation_share, **kwargs)

    def row(self, record: Mapping[str, Any], where: str) -> PromptRow:
        """Return the row of a problem.

        Raises:
            UserError: `Body`, `Question` or `Answer` is missing, or is no text or number.
        """
        prompt = _join(text_cell(record, "Body", where), text_cell(record, "Question", where))
        answer = plain_number(cell(record, "Answer", where), f"{where}: 'Answer'")
        solution = (
            None
            if record.get("Equation") is None
            else f"{_plain(text_cell(record, 'Equation', where))} = {answer}"
        )
        extra = {key: record[key] for key in record if key not in ("Body", "Question")}
        return PromptRow(prompt, answer, solution, extra, where=where)


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
