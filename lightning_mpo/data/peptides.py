"""Peptides to complete: the first residues are the context, the others a demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.checks import at_least, one_of, within
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.peptide_files import RESIDUES, Peptide, read_fasta, read_table, select
from lightning_mpo.seeding import is_held_out
from lightning_mpo.types import PromptRow, Splits


class LetterPrompts(PromptDataModule):
    """Prompts of letters rather than words, for models that have no chat template.

    Args:
        chat_template: as for `PromptDataModule`; off unless it is set.
        kwargs: as for `PromptDataModule`.
    """

    searches_ngrams = False  # prompts are a few letters

    def __init__(self, chat_template: bool = False, **kwargs: Any) -> None:
        super().__init__(chat_template=chat_template, **kwargs)


class Peptides(LetterPrompts):
    """Contexts of a few residues from real peptides, of a FASTA file or a table of modlamp.

    A hash of the context decides its side, so a context stands on one side of the split only. A
    training context that begins several peptides has a row for each of them. A held-out context has
    one row, as intervals count contexts. No right answer is known: rewards judge the whole peptide.

    Args:
        fasta: a FASTA file, or several; None: `table`.
        table: table of modlamp, one of `peptide_files.TABLES`.
        kind: class of the table to take, such as `AMP`; None: all.
        prefix: residues of a context.
        shortest: fewest residues of a peptide.
        longest: most residues of a peptide.
        held_out_share: share of the contexts that are held out.
        foreign: a peptide with letters outside the 20 amino acids is left out and counted, or
            refused.
        kwargs: as for `LetterPrompts`.

    Raises:
        UserError: an option is out of range, or contexts fill the shortest peptides.
    """

    def __init__(
        self,
        fasta: str | list[str] | None = None,
        table: str = "AMPvsUniProt",
        kind: str | None = None,
        prefix: int = 4,
        shortest: int = 8,
        longest: int = 48,
        held_out_share: float = 0.2,
        foreign: Literal["skip", "refuse"] = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        at_least(name, 1, prefix=prefix)
        at_least(name, 1, shortest=shortest)
        at_least(name, shortest, longest=longest)
        within(name, "(0, 1)", held_out_share=held_out_share)
        one_of(name, ("skip", "refuse"), foreign=foreign)
        if prefix >= shortest:
            raise UserError(
                f"`{name}.prefix` = {prefix} residues leave nothing to complete of a peptide of "
                f"`shortest` = {shortest}: lower `prefix` or raise `shortest`"
            )
        self.fasta = [fasta] if isinstance(fasta, str) else fasta
        self.table, self.kind, self.prefix = table, kind, prefix
        self.shortest, self.longest = shortest, longest
        self.held_out_share, self.foreign = held_out_share, foreign

    def check_response(self, max_new_tokens: int) -> None:
        """Refuse a length of responses that only a context of the shortest peptides would fill."""
        if max_new_tokens < 2:
            raise UserError(
                f"`{type(self).__name__}` needs a residue and an end token, over "
                f"`rollout.max_new_tokens` = {max_new_tokens}"
            )

    def load(self) -> Splits:
        """Read the peptides, and print how many are left out.

        Raises:
            UserError: a source cannot be read, has no peptide to use, or leaves a side empty.
        """
        name = type(self).__name__
        chosen = select(self._read(), self.shortest, self.longest, self.kind)
        rank_zero_info(f"data       {name}: {chosen.describe()}")
        if not chosen.peptides:
            raise UserError(f"`{name}` has no peptide to use: {chosen.describe()}")
        train: list[PromptRow] = []
        held_out: dict[str, PromptRow] = {}
        for peptide in chosen.peptides:
            context, rest = peptide.residues[: self.prefix], peptide.residues[self.prefix :]
            extra = {} if peptide.kind is None else {"kind": peptide.kind}
            row = PromptRow(context, "", rest, extra)
            if is_held_out(context, self.held_out_share):
                held_out.setdefault(context, row)
            else:
                train.append(row)
        if not train or not held_out:
            side = "train on" if not train else "hold out"
            raise UserError(
                f"`{name}` has no context to {side}: {chosen.describe()}; change "
                f"`held_out_share` = {self.held_out_share:g}, or give more peptides"
            )
        return Splits(train, list(held_out.values()))

    def _read(self) -> Sequence[Peptide]:
        if self.fasta is None:
            peptides = read_table(self.table, "data.table")
            kinds = sorted({str(peptide.kind) for peptide in peptides})
            if self.kind is not None and self.kind not in kinds:
                raise UserError(
                    f"`Peptides.kind` must be one of {', '.join(kinds)}, got {self.kind!r}"
                )
        else:
            peptides = [part for path in self.fasta for part in read_fasta(path, "data.fasta")]
            if self.kind is not None:
                raise UserError(
                    "`Peptides.kind` names a class of `table`, and FASTA files have none"
                )
        if self.foreign == "refuse":
            for peptide in peptides:
                letters = sorted(set(peptide.residues) - set(RESIDUES))
                if letters:
                    raise UserError(
                        f"the peptide {peptide.residues[:40]!r} has the letter {letters[0]!r} "
                        "outside the 20 amino acids; `foreign: skip` leaves such peptides out"
                    )
        return peptides
