"""What all members of axes share: they are shown by their options, and refuse members beside which
they have no meaning.

An axis is an abstract class, such as `Support`. A member is a frozen dataclass behind it, which
checks its options in `__post_init__`. Facts of a class, such as `Support.slots_name`, have no type
annotation: the parser of configurations would evaluate it in the file of the member.
"""

from __future__ import annotations

from abc import ABC
from typing import TypeVar

Kind = TypeVar("Kind")


class Member(ABC):  # noqa: B024  axes have the abstract methods
    """A choice on an axis."""

    def check_with(self, axes: Axes) -> None:
        """Refuse members of other axes beside which this one has no meaning.

        Args:
            axes: all members of the objective.

        Raises:
            UserError: names both members and an alternative.
        """

    def __repr__(self) -> str:
        """Return `Name(option=value, …)`; dataclasses bring the same of their own."""
        options = (f"{k}={value!r}" for k, value in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(options)})"


class Axes:
    """The members of an objective, found by their axis.

    Args:
        members: one for each axis that must have one, and any number of loss terms.

    Example:
        >>> from lightning_mpo.objective.supports import Support, TopK
        >>> Axes(TopK(8))[Support]
        TopK(k=8, from_reference=False, outside='refuse', within=None)
    """

    def __init__(self, *members: Member) -> None:
        self.members = members

    def __getitem__(self, axis: type[Kind]) -> Kind:
        """Return the member of an axis that always has one."""
        return self.all(axis)[0]

    def all(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """Return all members of an axis or class, in their order."""
        return tuple(member for member in self.members if isinstance(member, kind))

    def check(self) -> None:
        """Let every member refuse the others.

        Raises:
            UserError: two of them have no meaning together.
        """
        for member in self.members:
            member.check_with(self)
