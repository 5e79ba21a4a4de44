"""A reward that checks expressions of the task Countdown, in exact fractions."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.thoughts import after_thoughts
from lightning_mpo.types import PromptRow

NUMBERS = "nums"
"""Column with the given numbers, as in the data sets of this task on the hub."""
EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,400}")
"""Texts that are parsed. The limit keeps the parser from deep recursion."""
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CountdownAnswer(Reward):
    """1 if the response is an expression of the given numbers that equals the target, else 0.

    The expression is the content of the last `<answer>…</answer>`, else the last line. It has whole
    numbers, `+`, `-`, `*`, `/` and brackets; it may end in `= 24`, if that is the target. It is
    parsed and never run. After thoughts, only the text behind `</think>` is read. A response that
    was cut off gets 0. A row whose target or numbers cannot be read is not judged.

    Args:
        numbers: column with the list of given numbers.
        all_numbers: each number must be used exactly once; false: at most once.
        weight: factor of this reward in the sum.

    Raises:
        UserError: the column has no name, or the weight is not a number.

    Example:
        >>> done = Completion("p", "(8-4)*7-4", "24", 9, True, {"nums": [4, 7, 8, 4]})
        >>> CountdownAnswer().score([done])
        [1.0]
    """

    is_accuracy = True

    def __init__(
        self, numbers: str = NUMBERS, all_numbers: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if not numbers:
            raise UserError(f"`{self.title}.numbers` must name a column, got an empty text")
        self.numbers, self.all_numbers = numbers, all_numbers

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [parse(answer_of(completion)) is not None for completion in completions]

    def check_columns(self, columns: Sequence[str]) -> None:
        if self.numbers not in columns:
            raise UserError(
                f"`{self.title}` needs the column {self.numbers!r} with the given numbers, and the "
                f"data has {', '.join(map(repr, columns)) or 'no further columns'}; set "
                f"`{self.title}.numbers`, or take the data `Countdown`"
            )

    def _score(self, completion: Completion) -> float | None:
        # target and given numbers
        target = whole_number(completion.target)
        listed = completion.row.get(self.numbers)
        given = [whole_number(n) for n in listed] if isinstance(listed, list | tuple) else [None]
        if target is None or None in given:
            _warn_of_row(completion.target, repr(listed))
            return None
        # the expression, its numbers and its value
        tree = parse(answer_of(completion))
        if tree is None or not completion.finished:
            return 0.0
        used = Counter(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
        available = Counter(given)
        if not (used == available if self.all_numbers else used <= available):
            return 0.0
        try:
            return float(value_of(tree) == target)
        except ZeroDivisionError:
            return 0.0


def answer_of(completion: Completion) -> str:
    """Return the expression of a response, which may be wrong; empty: there is none.

    A right side `= N` is left out if N is the target.
    """
    text = after_thoughts(completion.text, completion.thinking) or ""
    before, closed, _ = text.rpartition("</answer>")
    text = before.rpartition("<answer>")[2] if closed else text.strip().rpartition("\n")[2]
    expression, equals, value = text.partition("=")
    if equals and value.strip() != completion.target.strip():
        return ""
    return expression.translate(SIGNS).strip()


def parse(text: str) -> ast.expr | None:
    """Return the tree of an expression of whole numbers, `+`, `-`, `*`, `/` and brackets.

    Args:
        text: the expression.

    Returns:
        The tree, whose other nodes are operators. None: the text is another one.

    Example:
        >>> parse("2**9"), parse("abs(2)"), parse("")
        (None, None, None)
    """
    if not EXPRESSION.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        operation = isinstance(node, ast.BinOp) and type(node.op) in OPERATORS
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        leaf = isinstance(node, ast.Constant | ast.operator | ast.unaryop)
        if not (operation or negative or leaf):
            return None
    return tree


def value_of(tree: ast.expr) -> Fraction:
    """Return the exact value of a tree of `parse`.

    Raises:
        ZeroDivisionError: a divisor is 0.

    Example:
        >>> value_of(parse("(1+2)/4"))
        Fraction(3, 4)
    """
    if isinstance(tree, ast.BinOp):
        return OPERATORS[type(tree.op)](value_of(tree.left), value_of(tree.right))
    if isinstance(tree, ast.UnaryOp):
        return -value_of(tree.operand)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return Fraction(tree.value)
    raise TypeError(f"`tree` must come from `parse`, got {type(tree).__name__}")


def whole_number(value: object) -> int | None:
    """Return a whole number, also one that is written as text or as 24.0; None: it is none."""
    match = re.fullmatch(r"\s*(-?[0-9]{1,18})(\.0*)?\s*", str(value))
    return None if match is None or isinstance(value, bool) else int(match[1])


def is_countdown(row: PromptRow) -> bool:
    """Return whether an expression answers the row, as it has given numbers and a solution of them.

    Example:
        >>> is_countdown(PromptRow("4,6=", "24", "4*6", {"nums": [4, 6]}))
        True
    """
    return NUMBERS in row.extra and row.solution is not None and parse(row.solution) is not None


def right_expressions(row: PromptRow) -> dict[str, str]:
    """Return the solution of a row by form: bare, and in tags. Empty: it misses the target.

    Demonstrations may be wrong on purpose.
    """
    tree = parse(row.solution or "")
    try:
        right = tree is not None and value_of(tree) == whole_number(row.target)
    except ZeroDivisionError:
        right = False
    if not right or row.solution is None:
        return {}
    return {"solution": row.solution, "tagged": f"<answer>{row.solution}</answer>"}


@lru_cache(maxsize=1024)
def _warn_of_row(target: str, numbers: str) -> None:
    warnings.warn(
        f"`CountdownAnswer` cannot read the target {target[:60]!r} or the numbers {numbers[:60]}; "
        "rows need whole numbers, and these are not judged",
        stacklevel=2,
    )
