"""Checks of options: a wrong value raises one line that names the option and the values that it
takes.

`None` passes every check, as it means that an option is not used. `owner` is the class or section
that has the option, as a configuration writes it; options are keyword arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from lightning_mpo.errors import UserError

LARGEST_SIZE = 10_000_000
"""Most rows, tokens or layers that an option may ask for. It is far above any machine, and below
what hangs one.
"""
LARGEST_NUMBER = 1e9
"""Most that a coefficient or bound may be. Above it float32 loses what it is added to."""
LEAST_TEMPERATURE = 1e-6
"""Logits that are divided by less would overflow; at this temperature sampling is greedy already."""
LARGEST_SEED = 2**63 - 1


def at_least(owner: str, least: int, *, most: int = LARGEST_SIZE, **options: Any) -> None:
    """Refuse options that are not whole numbers from `least` to `most`.

    Args:
        owner: class or section, as a configuration writes it.
        least: the smallest value.
        most: the largest value.
        options: values by name.

    Raises:
        UserError: an option is not a whole number, or out of range.

    Example:
        >>> at_least("rollout", 1, prompts=0)
        Traceback (most recent call last):
        lightning_mpo.errors.UserError: `rollout.prompts` must be at least 1, got 0
    """
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"`{owner}.{name}` must be a whole number, got {value!r}")
        if int(value) < least:
            raise UserError(f"`{owner}.{name}` must be at least {least}, got {value}")
        if int(value) > most:
            raise UserError(f"`{owner}.{name}` must be at most {most:,}, got {value}")


def seeds(owner: str, **options: Any) -> None:
    """Refuse options that no random number generator takes as a seed.

    Raises:
        UserError: an option is not a whole number from 0 to `LARGEST_SEED`.
    """
    at_least(owner, 0, most=LARGEST_SEED, **options)


def finite(owner: str, *, most: float = LARGEST_NUMBER, **options: Any) -> None:
    """Refuse options that are not numbers from -`most` to `most`.

    Raises:
        UserError: an option is not a number, or out of range.
    """
    for name, value in options.items():
        _check_number(owner, name, value)
        if value is not None and not -most <= value <= most:
            raise UserError(
                f"`{owner}.{name}` must be a number from {-most:g} to {most:g}, got {value}"
            )


def positive(owner: str, *, most: float = LARGEST_NUMBER, note: str = "", **options: Any) -> None:
    """Refuse options that are not numbers above 0.

    Args:
        owner: class or section, as a configuration writes it.
        most: the largest value.
        note: end of the message: advice on what to write instead.
        options: values by name.

    Raises:
        UserError: an option is not a number, not above 0, or above `most`.
    """
    for name, value in options.items():
        _check(owner, name, value, lambda x: x > 0, "be positive", most, note)


def above(
    owner: str, bound: float, *, most: float = LARGEST_NUMBER, note: str = "", **options: Any
) -> None:
    """Refuse options that are not numbers above a bound. Arguments are those of `positive`.

    Raises:
        UserError: an option is not a number, not above `bound`, or above `most`.
    """
    for name, value in options.items():
        _check(owner, name, value, lambda x: x > bound, f"be above {bound:g}", most, note)


def not_below(
    owner: str, bound: float, *, most: float = LARGEST_NUMBER, note: str = "", **options: Any
) -> None:
    """Refuse options that are not numbers of at least a bound; unlike `at_least`, this takes
    fractions.

    Raises:
        UserError: an option is not a number, below `bound`, or above `most`.
    """
    requirement = f"be at least {bound:g}" if bound else "not be negative"
    for name, value in options.items():
        _check(owner, name, value, lambda x: x >= bound, requirement, most, note)


def temperatures(owner: str, **options: Any) -> None:
    """Refuse temperatures that are not positive, or by which logits overflow.

    Raises:
        UserError: an option is not a number, or below `LEAST_TEMPERATURE`.
    """
    positive(owner, **options)
    not_below(owner, LEAST_TEMPERATURE, **options)


def share_or_count(owner: str, of: str, **options: Any) -> None:
    """Refuse options that are neither a share, from 0 to below 1, nor a whole number.

    Args:
        owner: class or section, as a configuration writes it.
        of: the things that are counted, for the message.
        options: values by name.

    Raises:
        UserError: an option is neither.
    """
    for name, value in options.items():
        _check_number(owner, name, value)
        if value is not None and not (
            0 <= value < 1 or (1 <= value <= LARGEST_SIZE and value == int(value))
        ):
            raise UserError(
                f"`{owner}.{name}` must be a share below 1 or a whole number of {of}, got {value}"
            )


def within(owner: str, interval: str, **options: Any) -> None:
    """Refuse options outside an interval; a round bracket excludes its end.

    Args:
        owner: class or section, as a configuration writes it.
        interval: such as "(0, 1]".
        options: values by name.

    Raises:
        UserError: an option is not a number, or outside.

    Example:
        >>> within("Nucleus", "(0, 1]", p=0.0)
        Traceback (most recent call last):
        lightning_mpo.errors.UserError: `Nucleus.p` must be in (0, 1], got 0.0
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in options.items():
        _check_number(owner, name, value)
        if value is None:
            continue
        over = value >= low if interval[0] == "[" else value > low
        under = value <= high if interval[-1] == "]" else value < high
        if not (over and under):
            raise UserError(f"`{owner}.{name}` must be in {interval}, got {value}")


def one_of(owner: str, choices: Iterable[Any], **options: Any) -> None:
    """Refuse options that are not among the choices.

    Raises:
        UserError: an option is not among them.
    """
    known = list(choices)
    for name, value in options.items():
        if value not in known:
            listed = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
            raise UserError(f"`{owner}.{name}` must be {listed}, got {value!r}")


def _check(
    owner: str,
    name: str,
    value: Any,
    good: Callable[[Any], bool],
    requirement: str,
    most: float,
    note: str,
) -> None:
    _check_number(owner, name, value, note)
    if value is not None and not good(value):
        raise UserError(f"`{owner}.{name}` must {requirement}, got {value}{note}")
    if value is not None and value > most:
        raise UserError(f"`{owner}.{name}` must be at most {most:g}, got {value}{note}")


def _check_number(owner: str, name: str, value: Any, note: str = "") -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise UserError(f"`{owner}.{name}` must be a number, got {value!r}{note}")
    if value is not None and math.isinf(value):
        raise UserError(f"`{owner}.{name}` must be a finite number, got {value}{note}")


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
