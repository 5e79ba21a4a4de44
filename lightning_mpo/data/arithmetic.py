"""Generated arithmetic whose answers are written out in steps."""

from __future__ import annotations

import hashlib
import random
from typing import Any, ClassVar

from lightning_mpo.checks import at_least, seeds, within
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits


class Arithmetic(PromptDataModule):
    """Column addition with the columns written out from the right, then the sum.

    A column is written as its two digits, the carry into it, and a sum of two digits. A
    careful solution carries: `484+338=` is answered by `4+8+0=12,8+3+1=12,4+3+1=08;822`. A careless
        one never does:
    `4+8+0=12,8+3+0=11,4+3+0=07;712`, which is right only where there is nothing to carry. A share
    of the solutions, which a supervised warm-up imitates, is careless; the target is always right.
    A policy that was warmed up on them knows both habits, and only a reward on the sum says which
    one works.

    Held-out problems are those whose prompt hashes below `held_out_share`; no training problem
    does.

    Args:
        digits: of both operands.
        careless_share: probability that a solution is careless.
        train_problems: distinct training problems.
        held_out_problems: distinct validation problems.
        held_out_share: of all problems.
        problem_seed: of the problems; the order of training prompts has its own seed.
        chat_template: as for `PromptDataModule`; the tiny policy has none.
        kwargs: as for `PromptDataModule`.
    """

    def __init__(
        self,
        digits: int = 3,
        careless_share: float = 0.0,
        train_problems: int = 20_000,
        held_out_problems: int = 1_000,
        held_out_share: float = 0.1,
        problem_seed: int = 0,
        chat_template: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(chat_template=chat_template, **kwargs)
        name = type(self).__name__
        within(name, "[0, 1]", careless_share=careless_share)
        within(name, "(0, 1)", held_out_share=held_out_share)
        at_least(name, 1, train_problems=train_problems, held_out_problems=held_out_problems)
        at_least(name, 1, most=1000, digits=digits)
        seeds(name, problem_seed=problem_seed)
        pairs = self._count(digits)
        if (
            train_problems > pairs * (1 - held_out_share) / 2
            or held_out_problems > pairs * held_out_share / 2
        ):
            raise UserError(
                f"`{type(self).__name__}.digits` = {digits} gives {pairs} problems, too few to "
                f"draw {train_problems} for training and {held_out_problems} to hold out; raise "
                "`digits` or ask for fewer"
            )
        self.digits, self.careless_share = digits, careless_share
        self.train_problems, self.held_out_problems = train_problems, held_out_problems
        self.held_out_share, self.problem_seed = held_out_share, problem_seed

    def load(self) -> Splits:
        random_numbers = random.Random(self.problem_seed)
        rows: dict[bool, dict[str, PromptRow]] = {False: {}, True: {}}
        problems = {False: self.train_problems, True: self.held_out_problems}
        # draw until both sides are full
        while any(len(rows[side]) < problems[side] for side in rows):
            a, b = self._operands(random_numbers)
            prompt = f"{a}{self.sign}{b}="
            side = is_held_out(prompt, self.held_out_share)
            if prompt not in rows[side] and len(rows[side]) < problems[side]:
                target, solution = self._solve(
                    a, b, careful=random_numbers.random() >= self.careless_share
                )
                rows[side][prompt] = PromptRow(prompt, target, solution)
        return Splits(list(rows[False].values()), list(rows[True].values()))

    sign: ClassVar[str] = "+"

    @staticmethod
    def _count(digits: int) -> int:
        """Number of problems."""
        return int((9 * 10 ** (digits - 1)) ** 2)

    def _operands(self, random_numbers: random.Random) -> tuple[int, int]:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        return random_numbers.randint(low, high), random_numbers.randint(low, high)

    def _solve(self, a: int, b: int, careful: bool) -> tuple[str, str]:
        """Return the right answer and a solution."""
        return str(a + b), column_addition(a, b, carry=careful)


class Multiplication(Arithmetic):
    """A number of several digits times one digit, worked from the right.

    `4321*7=` is answered by `1*7+0=07,2*7+0=14,…;30247`.

    Careless solutions drop the carries. The arguments are those of `Arithmetic`. `digits` are those
    of the first operand; the second operand is from 2 to 9.
    """

    sign: ClassVar[str] = "*"

    @staticmethod
    def _count(digits: int) -> int:
        return int(9 * 10 ** (digits - 1) * 8)

    def _operands(self, random_numbers: random.Random) -> tuple[int, int]:
        return random_numbers.randint(
            10 ** (self.digits - 1), 10**self.digits - 1
        ), random_numbers.randint(2, 9)

    def _solve(self, a: int, b: int, careful: bool) -> tuple[str, str]:
        return str(a * b), long_multiplication(a, b, carry=careful)


def is_held_out(prompt: str, share: float) -> bool:
    """Return whether a prompt belongs to the held-out side: a pure function of its text."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < share * 2**64


def column_addition(a: int, b: int, carry: bool) -> str:
    """Write out the columns of `a + b` from the right, with or without carries, and their sum.

    Example:
        >>> column_addition(484, 338, carry=True)
        '4+8+0=12,8+3+1=12,4+3+1=08;822'
        >>> column_addition(484, 338, carry=False)
        '4+8+0=12,8+3+0=11,4+3+0=07;712'
    """
    carried, column, steps, digits = 0, 0, [], ""
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        column = int(x) + int(y) + carried
        steps.append(f"{x}+{y}+{carried}={column:02d}")
        digits = f"{column % 10}{digits}"
        carried = column // 10 if carry else 0
    return f"{','.join(steps)};{column // 10 or ''}{digits}"


def long_multiplication(a: int, b: int, carry: bool) -> str:
    """Multiply each digit of `a` by the digit `b` from the right, and write out the product.

    Careless work drops the carries.

    Example:
        >>> long_multiplication(484, 3, carry=True)
        '4*3+0=12,8*3+1=25,4*3+2=14;1452'
        >>> long_multiplication(484, 3, carry=False)
        '4*3+0=12,8*3+0=24,4*3+0=12;1242'
    """
    carried, product, steps, digits = 0, 0, [], ""
    for x in reversed(str(a)):
        product = int(x) * b + carried
        steps.append(f"{x}*{b}+{carried}={product:02d}")
        digits = f"{product % 10}{digits}"
        carried = product // 10 if carry else 0
    return f"{','.join(steps)};{product // 10 or ''}{digits}"
