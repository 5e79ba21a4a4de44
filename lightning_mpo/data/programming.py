"""Programming problems whose answers are tested: HumanEval and MBPP. `CodeAnswer` runs the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mpo.data.hub import Hub
from lightning_mpo.data.table import PublicTable
from lightning_mpo.data.tables import cell, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

FENCE = "```"


class HumanEval(PublicTable):
    """HumanEval (Chen et al. 2021): 164 Python functions to complete.

    A fixed half of them is to validate on; `lightning-mpo evaluate` takes all. For a comparison
    with published numbers, train on other data. The columns `test` and `entry_point` hold the
    tests. With a chat template the solution is the whole function in a fenced block, else the text
    that goes on from the prompt.

    Args:
        path: `HumanEval.jsonl.gz` or its folder. None: `$LIGHTNING_MPO_DATA/humaneval` if it is
            there, else the hub's `openai/openai_humaneval`.
        instruction: text before each function. None: with a chat template a request for the whole
            function, else nothing. Keep it as it is to compare runs.
        suffix: text after each function. None: with a chat template the end of the block.
        validation_share: below 1 a share of the problems, from 1 on their number.
        kwargs: as for `PublicTable`.
    """

    FOLDER = "humaneval"
    TRAIN = Hub("openai/openai_humaneval", "test", file="HumanEval.jsonl.gz")
    TARGET = None
    judged = True

    def __init__(
        self,
        path: str | None = None,
        instruction: str | None = None,
        suffix: str | None = None,
        validation_share: float = 0.5,
        chat_template: bool = True,
        **kwargs: Any,
    ) -> None:
        request = "Complete this function. Write the whole function in one block of Python.\n\n"
        defaults = (f"{request}{FENCE}python\n", FENCE) if chat_template else ("", "")
        super().__init__(
            path,
            instruction=defaults[0] if instruction is None else instruction,
            suffix=defaults[1] if suffix is None else suffix,
            validation_share=validation_share,
            chat_template=chat_template,
            **kwargs,
        )

    @property
    def benchmark_rows(self) -> Sequence[PromptRow]:
        """All problems: published figures are of both halves."""
        return [*self.splits.train, *self.splits.validation]

    def row(self, record: Mapping[str, Any], where: str) -> PromptRow:
        for name in ("test", "entry_point"):
            text_cell(record, name, where)
        prompt, solution = (
            text_cell(record, name, where) for name in ("prompt", "canonical_solution")
        )
        if self.chat_template:
            solution = f"{FENCE}python\n{prompt}{solution.rstrip()}\n{FENCE}"
        return PromptRow(prompt, "", solution, dict(record), where=where)


class Mbpp(PublicTable):
    """MBPP (Austin et al. 2021): short Python tasks, 374 to train on, 500 to validate on.

    The prompt shows the tests, as in the paper. They are the column `test_list`.

    Args:
        path: folder with `train.jsonl` and `test.jsonl`. None: `$LIGHTNING_MPO_DATA/mbpp` if it is
            there, else the hub's `google-research-datasets/mbpp`.
        instruction: text before each task.
        suffix: text after the tests. Keep it as it is to compare runs.
        kwargs: as for `PublicTable`.
    """

    FOLDER = "mbpp"
    TRAIN = Hub("google-research-datasets/mbpp", "train", "full", file="train.jsonl")
    VALIDATION = Hub("google-research-datasets/mbpp", "test", "full", file="test.jsonl")
    TARGET = None
    judged = True

    def __init__(
        self,
        path: str | None = None,
        instruction: str = "",
        suffix: str = "\n\nWrite the code in one block of Python.",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, instruction=instruction, suffix=suffix, **kwargs)

    def row(self, record: Mapping[str, Any], where: str) -> PromptRow:
        task, code = (text_cell(record, name, where).strip() for name in ("text", "code"))
        tests = cell(record, "test_list", where)
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise UserError(f"{where}: 'test_list' must be a list of texts")
        prompt = "\n".join([f"{task} Your code should pass these tests:\n", *tests])
        solution = f"{FENCE}python\n{code}\n{FENCE}".replace("\r\n", "\n")
        return PromptRow(prompt, "", solution, dict(record), where=where)
