"""Problems of mathematical competitions: MATH, MATH-500, AIME and AMC."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_mpo.data.hub import Hub
from lightning_mpo.data.table import PublicTable
from lightning_mpo.data.tables import target_cell, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


class MathProblems(PublicTable):
    r"""MATH (Hendrycks et al. 2021): 7,500 problems to train on, 5,000 to validate on.

    The answer is the column `answer`, or else the content of the last `\boxed{…}` of the solution.
    The columns `level` (1 to 5) and `type` (such as "Algebra") serve a curriculum and rewards.

    Args:
        path: folder with `train.jsonl` and the file of the validation split. None:
            `$LIGHTNING_MPO_DATA/math` if it is there, else the hub.
        instruction: text before each problem.
        suffix: text after each problem. Keep it as it is to compare runs.
        kwargs: as for `PublicTable`.
    """

    FOLDER = "math"
    TRAIN = Hub("DigitalLearningGmbH/MATH-lighteval", "train", file="train.jsonl")
    VALIDATION = Hub("DigitalLearningGmbH/MATH-lighteval", "test", file="test.jsonl")

    def __init__(
        self,
        path: str | None = None,
        instruction: str = "",
        suffix: str = "\n\nSolve it step by step. Put the final answer in \\boxed{}.",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, instruction=instruction, suffix=suffix, **kwargs)

    def row(self, record: Mapping[str, Any], where: str) -> PromptRow:
        # problem, solution and answer
        problem, solution = text_cell(record, "problem", where).strip(), record.get("solution")
        if record.get("answer") is not None:
            target = target_cell(record, "answer", where)
        else:
            boxed = last_boxed(text_cell(record, "solution", where))
            if boxed is None:
                raise UserError(f"{where}: 'solution' has no \\boxed{{…}} with the answer")
            target = boxed
        # level and type, which MATH-500 writes as 3 and `subject`, and MATH as "Level 3" and `type`
        columns = {**record, "type": record.get("type", record.get("subject"))}
        level = re.fullmatch(r"(?:Level )?(\d+)", str(record.get("level")))
        columns["level"] = int(level[1]) if level else record.get("level")
        return PromptRow(problem, target, solution, columns, where=where)


class Math500(MathProblems):
    """MATH to train on, and the 500 problems of its test split in MATH-500 to validate on.

    Args:
        kwargs: as for `MathProblems`; the file of the validation split is `math500.jsonl`.
    """

    VALIDATION = Hub("HuggingFaceH4/MATH-500", "test", file="math500.jsonl")


class Aime(MathProblems):
    """MATH to train on, and the 30 problems of AIME 2024 to validate on.

    Another set in this form is a subclass with another `VALIDATION`.

    Args:
        kwargs: as for `MathProblems`; the file of the validation split is `aime_2024.jsonl`.
    """

    VALIDATION = Hub("HuggingFaceH4/aime_2024", "train", file="aime_2024.jsonl")


class Amc(MathProblems):
    """MATH to train on, and 83 problems of AMC 12 (2022 and 2023) to validate on.

    Args:
        kwargs: as for `MathProblems`; the file of the validation split is `amc.jsonl`.
    """

    VALIDATION = Hub("AI-MO/aimo-validation-amc", "train", file="amc.jsonl")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` or `\fbox{…}` of a text; None: there is none.

    Example:
        >>> last_boxed(r"So \boxed{7}, or \boxed{\frac{1}{2}}."), last_boxed(r"It is $\boxed 9$.")
        ('\\frac{1}{2}', '9')
    """
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not starts:
        return None
    rest = text[starts[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for position, mark in enumerate(rest):
        # a brace behind a backslash is text
        if mark in "{}" and rest[position - 1 : position] != "\\":
            depth += 1 if mark == "{" else -1
            if not depth:
                return rest[1:position].strip()
    return None
