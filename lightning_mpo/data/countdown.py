"""Generated problems of the numbers round of the television game Countdown."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from lightning_mpo.checks import at_least, within
from lightning_mpo.data.generated import GeneratedProblems
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.countdown import NUMBERS


class Round(NamedTuple):
    """Given numbers, the target, and an expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    expression: str


class Countdown(GeneratedProblems):
    """Expressions of given numbers that equal a target; `CountdownAnswer` checks them.

    The answer to `4,7,8;24=` may be `8*(7-4)`. Each problem comes from a random expression, so it
    has an answer: this expression is the demonstration. A careless demonstration uses each number
    once, with random operators, and reaches the target by chance only. The column `nums` holds the
    given numbers.

    `TinyPolicy` needs the characters `0123456789+-*/(),;=`.

    Args:
        numbers: how many numbers are given.
        largest: the largest given number.
        largest_target: the largest target.
        careless_share: probability that a demonstration is careless.
        prompt: text of a prompt, with `{numbers}` and `{target}`.
        kwargs: as for `GeneratedProblems`.

    Raises:
        UserError: an option is out of range, leaves too few problems, or a prompt does not name
            numbers and target.
    """

    def __init__(
        self,
        numbers: int = 4,
        largest: int = 20,
        largest_target: int = 100,
        careless_share: float = 0.0,
        prompt: str = "{numbers};{target}=",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # ranges
        name = type(self).__name__
        at_least(name, 2, most=6, numbers=numbers)
        at_least(name, 2, most=1000, largest=largest)
        # any numbers reach a target of at most `largest`, by differences and quotients
        at_least(name, largest, most=1_000_000, largest_target=largest_target)
        within(name, "[0, 1]", careless_share=careless_share)
        if "{numbers}" not in prompt or "{target}" not in prompt:
            raise UserError(
                f"`{name}.prompt` must contain {{numbers}} and {{target}}, got {prompt[:60]!r}"
            )
        self.check_count(largest**numbers, "largest", largest)
        self.numbers, self.largest, self.largest_target = numbers, largest, largest_target
        self.careless_share, self.prompt = careless_share, prompt

    def draw(self, random_numbers: random.Random) -> Round:
        while True:
            numbers = tuple(random_numbers.randint(1, self.largest) for _ in range(self.numbers))
            target, expression = random_expression(numbers, random_numbers)
            if target <= self.largest_target:
                return Round(numbers, target, expression)

    def write(self, problem: Round) -> str:
        numbers = ",".join(map(str, problem.numbers))
        return self.prompt.replace("{numbers}", numbers).replace("{target}", str(problem.target))

    def solve(self, problem: Round, random_numbers: random.Random) -> tuple[str, str]:
        # careless work has its own stream for each problem, so it changes no later problem
        careless_numbers = random.Random(f"{self.problem_seed} {problem.numbers} {problem.target}")
        careless = careless_numbers.random() < self.careless_share
        wrong = random_expression(problem.numbers, careless_numbers)[1]
        return str(problem.target), wrong if careless else problem.expression

    def columns(self, problem: Round) -> dict[str, Any]:
        return {NUMBERS: list(problem.numbers)}


def random_expression(numbers: tuple[int, ...], random_numbers: random.Random) -> tuple[int, str]:
    """Combine numbers in random order, with random operators, until one value is left.

    Each intermediate result is a positive whole number.

    Args:
        numbers: positive whole numbers, each of which is used once.
        random_numbers: the source of randomness.

    Returns:
        The value, and the expression with brackets where they are needed.

    Example:
        >>> random_expression((6, 2, 5), random.Random(2))
        (3, '6+2-5')
    """
    # value, text, and the operator that is applied last
    parts = [(number, str(number), "") for number in numbers]
    while len(parts) > 1:
        # two parts in random order
        first = parts.pop(random_numbers.randrange(len(parts)))
        second = parts.pop(random_numbers.randrange(len(parts)))
        a, b = first[0], second[0]
        results = {"+": a + b, "*": a * b}
        if a > b:
            results["-"] = a - b
        if a % b == 0:
            results["/"] = a // b
        sign = random_numbers.choice(list(results))
        # brackets on the left under * and /, and on the right behind -, * and /
        left = bracketed(first[1], sign in "*/" and first[2] in ("+", "-"))
        sums = sign in "-*/" and second[2] in ("+", "-")
        right = bracketed(second[1], sums or (sign == "/" and second[2] in ("*", "/")))
        parts.append((results[sign], f"{left}{sign}{right}", sign))
    return parts[0][:2]


def bracketed(text: str, needed: bool) -> str:
    """Return the text, in brackets if they are needed."""
    return f"({text})" if needed else text
