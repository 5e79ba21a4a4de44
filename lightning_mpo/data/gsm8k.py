"""GSM8K (Cobbe et al. 2021): 8,792 word problems of primary school with worked solutions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_mpo.data.hub import Hub
from lightning_mpo.data.table import PublicTable
from lightning_mpo.data.tables import plain_number, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


class Gsm8k(PublicTable):
    """Word problems whose answer is a whole number: 7,473 to train on, 1,319 to validate on.

    The solution that a supervised warm-up imitates ends in `#### 72`, as the suffix asks.

    Args:
        path: folder with `train.jsonl` and `test.jsonl`. None: `$LIGHTNING_MPO_DATA/gsm8k` if it is
            there, else the hub's `openai/gsm8k`.
        instruction: text before each problem.
        suffix: text after each problem. Keep it as it is to compare runs.
        calculator: leave the calculator's `<<48/2=24>>` in solutions.
        kwargs: as for `PublicTable`.
    """

    FOLDER = "gsm8k"
    TRAIN = Hub("openai/gsm8k", "train", "main", file="train.jsonl")
    VALIDATION = Hub("openai/gsm8k", "test", "main", file="test.jsonl")

    def __init__(
        self,
        path: str | None = None,
        instruction: str = "",
        suffix: str = "\n\nSolve it step by step. Write the final number after ####.",
        calculator: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, instruction=instruction, suffix=suffix, **kwargs)
        self.calculator = calculator

    def row(self, record: Mapping[str, Any], where: str) -> PromptRow:
        question, solution = (text_cell(record, name, where) for name in ("question", "answer"))
        _, mark, number = solution.rpartition("####")
        if not mark:
            raise UserError(f"{where}: 'answer' has no #### before its number")
        target = plain_number(number, f"{where}: the number behind ####")
        if not self.calculator:
            solution = re.sub(r"<<[^<>]*>>", "", solution)
        return PromptRow(question.strip(), target, solution, dict(record), where=where)
