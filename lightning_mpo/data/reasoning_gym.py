"""Tasks of the package reasoning-gym, which generates problems and checks their answers."""

from __future__ import annotations

import random
from typing import Any

from lightning_mpo.checks import at_least, seeds
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.tables import shared_prompts
from lightning_mpo.rewards.reasoning_gym import COLUMN, make_task
from lightning_mpo.types import PromptRow, Splits


class ReasoningGym(PromptDataModule):
    """Problems of a task of reasoning-gym; `ReasoningGymAnswer` checks answers by its verifier.

    Install the package by `pip install 'lightning-mpo[reasoning-gym]'`. Problems of the validation
    split that are also trained on are left out.

    Args:
        task: name of the task, such as `chain_sum`.
        options: options of the task, such as `{min_terms: 2, max_terms: 4}`.
        train_problems: number of training problems.
        held_out_problems: number of validation problems.
        problem_seed: seed of the problems; `seed` is that of their order.
        instruction: text before each problem.
        suffix: text after each problem. Keep it as it is to compare runs.
        kwargs: as for `PromptDataModule`.

    Raises:
        UserError: an option is out of range.
    """

    searches_ngrams = False  # problems differ in few words

    def __init__(
        self,
        task: str,
        options: dict[str, Any] | None = None,
        train_problems: int = 2_000,
        held_out_problems: int = 200,
        problem_seed: int = 0,
        instruction: str = "",
        suffix: str = "\n\nWrite the final answer as <answer>…</answer>.",
        **kwargs: Any,
    ) -> None:
        super().__init__(instruction=instruction, suffix=suffix, **kwargs)
        name = type(self).__name__
        at_least(name, 1, train_problems=train_problems, held_out_problems=held_out_problems)
        seeds(name, problem_seed=problem_seed)
        self.task, self.options = task, dict(options or {})
        self.train_problems, self.held_out_problems = train_problems, held_out_problems
        self.problem_seed = problem_seed

    def load(self) -> Splits:
        """Generate the problems.

        Raises:
            UserError: the package is not installed, or has no such task or option.
        """
        # two seeds of 32 bits from one
        drawn = random.Random(f"reasoning-gym {self.problem_seed}")
        train, held_out = (
            self._rows(count, drawn.randrange(2**32))
            for count in (self.train_problems, self.held_out_problems)
        )
        known = {id(row) for row in shared_prompts(train, held_out)}
        return Splits(train, [row for row in held_out if id(row) not in known])

    def _rows(self, count: int, seed: int) -> list[PromptRow]:
        task, rows = make_task(self.task, self.options | {"size": count, "seed": seed}), []
        for i in range(count):
            entry = task[i]
            column = {"task": self.task, "options": self.options, "entry": entry}
            answer = "" if entry["answer"] is None else str(entry["answer"])
            solution = f"<answer>{answer}</answer>" if answer else None
            where = f"problem {i + 1} of {self.task}"
            extra = {COLUMN: column}
            rows.append(PromptRow(entry["question"], answer, solution, extra, where=where))
        return rows
