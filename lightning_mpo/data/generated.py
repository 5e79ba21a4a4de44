"""The base of data modules that generate their problems."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Any

from lightning_mpo.checks import at_least, seeds, within
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.seeding import is_held_out
from lightning_mpo.types import PromptRow, Splits


class GeneratedProblems(PromptDataModule):
    """Distinct problems that are drawn at random.

    A subclass implements `draw`, `write` and `solve` for one problem. A hash of the prompt decides
    whether a problem is held out, so no problem is on both sides.

    Args:
        train_problems: number of distinct training problems.
        held_out_problems: number of distinct validation problems.
        held_out_share: share of all possible problems that are held out.
        problem_seed: seed of the problems; `seed` is that of the order of the training prompts.
        chat_template: as for `PromptDataModule`; the tiny policy has none.
        kwargs: as for `PromptDataModule`.

    Raises:
        UserError: an option is out of range.
    """

    searches_ngrams = False  # problems differ in few words

    def __init__(
        self,
        train_problems: int = 20_000,
        held_out_problems: int = 1_000,
        held_out_share: float = 0.1,
        problem_seed: int = 0,
        chat_template: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(chat_template=chat_template, **kwargs)
        name = type(self).__name__
        within(name, "(0, 1)", held_out_share=held_out_share)
        at_least(name, 1, train_problems=train_problems, held_out_problems=held_out_problems)
        seeds(name, problem_seed=problem_seed)
        self.train_problems, self.held_out_problems = train_problems, held_out_problems
        self.held_out_share, self.problem_seed = held_out_share, problem_seed

    @abstractmethod
    def draw(self, random_numbers: random.Random) -> Any:
        """Draw a problem, in a form that `write` and `solve` understand."""

    @abstractmethod
    def write(self, problem: Any) -> str:
        """Return the prompt of a problem."""

    @abstractmethod
    def solve(self, problem: Any, random_numbers: random.Random) -> tuple[str, str]:
        """Return the right answer and a demonstration.

        It draws the same number of random numbers for each `careless_share` and the like. Such
        options then change demonstrations, but not the problems that are drawn later.
        """

    def columns(self, problem: Any) -> dict[str, Any]:
        """Return the additional columns of the row of a problem, for rewards."""
        return {}

    def check_count(self, problems: int, option: str, value: int) -> None:
        """Refuse to draw more than half of the problems of a side, as most draws would be repeats.

        Args:
            problems: number of all possible problems.
            option: name of the option that limits this number.
            value: value of this option.

        Raises:
            UserError: there are too few problems.
        """
        share = self.held_out_share
        sides = {
            "train_problems": ("for training", problems * (1 - share), "lower"),
            "held_out_problems": ("to hold out", problems * share, "raise"),
        }
        for name, (use, available, direction) in sides.items():
            count, most = getattr(self, name), int(available / 2)
            if count > most:
                fewer = f", or set `{name}` to at most {most:,}" if most else ""
                raise UserError(
                    f"`{type(self).__name__}.{option}` = {value} gives {problems:,} problems, and "
                    f"`held_out_share` = {share:g} leaves {available:,.0f} {use}, of which at most "
                    f"half are drawn; `{name}` is {count:,}: raise `{option}`, {direction} "
                    f"`held_out_share`{fewer}"
                )

    def load(self) -> Splits:
        random_numbers = random.Random(self.problem_seed)
        rows: dict[bool, dict[str, PromptRow]] = {False: {}, True: {}}
        problems = {False: self.train_problems, True: self.held_out_problems}
        # draw until both sides are full
        while any(len(rows[side]) < problems[side] for side in rows):
            problem = self.draw(random_numbers)
            prompt = self.write(problem)
            side = is_held_out(prompt, self.held_out_share)
            if prompt not in rows[side] and len(rows[side]) < problems[side]:
                rows[side][prompt] = PromptRow(
                    prompt, *self.solve(problem, random_numbers), self.columns(problem)
                )
        return Splits(list(rows[False].values()), list(rows[True].values()))
