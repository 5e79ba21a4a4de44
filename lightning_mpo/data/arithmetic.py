"""Generated arithmetic whose answers are written out in steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_mpo.checks import at_least, within
from lightning_mpo.data.generated import GeneratedProblems


class Arithmetic(GeneratedProblems):
    """Column addition with the columns written out from the right, then the sum.

    A column is written as its two digits, the carry into it, and a sum of two digits. A
    careful solution carries: `484+338=` is answered by `4+8+0=12,8+3+1=12,4+3+1=08;822`. A careless
    one never does: `4+8+0=12,8+3+0=11,4+3+0=07;712`, which is right only where there is nothing to
    carry. A share of the solutions, which a supervised warm-up imitates, is careless; the target is
    always right. A policy that was warmed up on them knows both habits, and only a reward on the
    sum says which one works.

    Args:
        digits: number of digits of both operands.
        careless_share: probability that a solution is careless.
        kwargs: as for `GeneratedProblems`.
    """

    def __init__(self, digits: int = 3, careless_share: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        within(name, "[0, 1]", careless_share=careless_share)
        at_least(name, 1, most=1000, digits=digits)
        self.check_count(self._count(digits), "digits", digits)
        self.digits, self.careless_share = digits, careless_share

    sign: ClassVar[str] = "+"

    def _count(self, digits: int) -> int:
        """Number of problems."""
        return int((9 * 10 ** (digits - 1)) ** 2)

    def draw(self, random_numbers: random.Random) -> tuple[int, int]:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        return random_numbers.randint(low, high), random_numbers.randint(low, high)

    def write(self, problem: tuple[int, int]) -> str:
        return f"{problem[0]}{self.sign}{problem[1]}="

    def solve(self, problem: tuple[int, int], random_numbers: random.Random) -> tuple[str, str]:
        return self._solve(*problem, careful=random_numbers.random() >= self.careless_share)

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

    def _count(self, digits: int) -> int:
        return int(9 * 10 ** (digits - 1) * 8)

    def draw(self, random_numbers: random.Random) -> tuple[int, int]:
        return random_numbers.randint(
            10 ** (self.digits - 1), 10**self.digits - 1
        ), random_numbers.randint(2, 9)

    def _solve(self, a: int, b: int, careful: bool) -> tuple[str, str]:
        return str(a * b), long_multiplication(a, b, carry=careful)


class ForgetfulMultiplication(Multiplication):
    """Multiplication whose careless steps are single ones: each drops its carry by itself.

    A step of a demonstration drops its carry with probability `careless_share`, independent of the
    other steps. With `n` carries to keep, a policy that imitates them is right with probability
    `(1 - careless_share)**n`. So long problems are almost never solved, and those of which most
    steps are given often are.

    Args:
        digits: number of digits of the first operand.
        careless_share: probability that a step drops its carry.
        smallest_digit: smallest digit of both operands. From 4 on each step has a carry, so every
            problem has n = `digits` - 1 of them. None: as in `Multiplication`.
        kwargs: as for `GeneratedProblems`.
    """

    def __init__(
        self,
        digits: int = 3,
        careless_share: float = 0.0,
        smallest_digit: int | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(type(self).__name__, 2, most=9, smallest_digit=smallest_digit)
        self.smallest_digit = smallest_digit
        super().__init__(digits, careless_share, **kwargs)

    def _count(self, digits: int) -> int:
        if self.smallest_digit is None:
            return super()._count(digits)
        return int((10 - self.smallest_digit) ** (digits + 1))

    def draw(self, random_numbers: random.Random) -> tuple[int, int]:
        if self.smallest_digit is None:
            return super().draw(random_numbers)
        *first, second = (
            random_numbers.randint(self.smallest_digit, 9) for _ in range(self.digits + 1)
        )
        return int("".join(map(str, first))), second

    def solve(self, problem: tuple[int, int], random_numbers: random.Random) -> tuple[str, str]:
        a, b = problem
        carry = [random_numbers.random() >= self.careless_share for _ in str(a)]
        return str(a * b), long_multiplication(a, b, carry)


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


def long_multiplication(a: int, b: int, carry: bool | Sequence[bool]) -> str:
    """Multiply each digit of `a` by the digit `b` from the right, and write out the product.

    Careless work drops the carries: all of them, or those of the steps whose `carry` is false.

    Example:
        >>> long_multiplication(484, 3, carry=True)
        '4*3+0=12,8*3+1=25,4*3+2=14;1452'
        >>> long_multiplication(484, 3, carry=False)
        '4*3+0=12,8*3+0=24,4*3+0=12;1242'
        >>> long_multiplication(484, 3, carry=[True, False, True])
        '4*3+0=12,8*3+1=25,4*3+0=12;1252'
    """
    carried, product, steps, digits = 0, 0, [], ""
    carries = [carry] * len(str(a)) if isinstance(carry, bool) else carry
    for x, keeps in zip(reversed(str(a)), carries, strict=True):
        product = int(x) * b + carried
        steps.append(f"{x}*{b}+{carried}={product:02d}")
        digits = f"{product % 10}{digits}"
        carried = product // 10 if keeps else 0
    return f"{','.join(steps)};{product // 10 or ''}{digits}"
