"""Training rows of several data in one pool."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.over_data import INHERITED, OverData
from lightning_mpo.data.scaffold import Scaffolded
from lightning_mpo.errors import UserError
from lightning_mpo.types import Splits

SHARED = tuple(name for name in INHERITED if not name.startswith("validation") and name != "order")
"""Options that all data must have alike."""


class Mixed(OverData):
    """The training rows of several data, shuffled together: hard problems with easier ones.

    Validation rows are those of `base`. A row of `others` with a prompt among them is left out, and
    counted in a line at the start. Numbers of rows decide how often each kind is drawn.

    Args:
        base: the data whose options on texts and lengths, and whose validation rows count.
        others: further data. Their options on texts and lengths must be those of `base`.
        kwargs: as for `OverData`.

    Raises:
        UserError: `others` is empty, has other options on texts than `base`, or holds `Scaffolded`.

    Example:
        >>> from lightning_mpo.data import Multiplication
        >>> hard, easy = Multiplication(digits=6), Multiplication(digits=5, train_problems=5_000)
        >>> len(Mixed(hard, [easy]).splits.train)
        25000
    """

    def __init__(
        self, base: PromptDataModule, others: list[PromptDataModule], **kwargs: Any
    ) -> None:
        super().__init__(base, **kwargs)
        if not others:
            raise UserError("`Mixed.others` is empty; name at least one further data class")
        for part in (base, *others):
            if isinstance(part, Scaffolded):
                raise UserError("`Mixed` takes no `Scaffolded`: make `Mixed` the `Scaffolded.base`")
            for name in SHARED:
                mine, theirs = getattr(base, name), getattr(part, name)
                if mine != theirs:
                    raise UserError(
                        f"`Mixed`: `{name}` is {mine!r} in `base` and {theirs!r} in `others`; "
                        "set it alike"
                    )
        self.others = others

    def prepare_data(self) -> None:
        for part in (self.base, *self.others):
            part.prepare_data()

    @property
    def judged(self) -> bool:
        return all(part.judged for part in (self.base, *self.others))

    def check_response(self, max_new_tokens: int) -> None:
        for part in (self.base, *self.others):
            part.check_response(max_new_tokens)

    def load(self) -> Splits:
        """Return the training rows of all data, and the validation rows of `base`."""
        splits = self.base.load()
        self.shots = self.base.shots
        held_out = {row.prompt for row in splits.validation}
        train, counts, left_out = list(splits.train), [len(splits.train)], 0
        for part in self.others:
            rows = part.load().train
            allowed = [row for row in rows if row.prompt not in held_out]
            train += allowed
            counts.append(len(allowed))
            left_out += len(rows) - len(allowed)
        rank_zero_info(
            f"data       Mixed: {' + '.join(f'{count:,}' for count in counts)} training rows; "
            f"{left_out:,} with a validation prompt of `base` left out"
        )
        return Splits(train, splits.validation)
