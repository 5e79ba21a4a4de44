"""Peptides from FASTA files, and from the tables that the package modlamp ships."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_mpo.errors import UserError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""One-letter codes of the 20 amino acids that the genetic code names."""
TABLES = ("AMPvsUniProt", "AMPvsTMset", "ACP_CancPPD_vs_Random", "ACP_CancPPD_vs_TM")
"""Tables of modlamp: peptides of two classes."""


@dataclass(frozen=True)
class Peptide:
    """A sequence of residues, and its class if the source names one."""

    residues: str
    kind: str | None = None


@dataclass
class Selection:
    """Peptides that can be used, and the numbers of the others by reason."""

    peptides: list[Peptide] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the numbers in one line."""
        total = len(self.peptides) + sum(self.left_out.values())
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items() if count]
        return f"{len(self.peptides):,} of {total:,} peptides" + (
            f"; left out: {', '.join(reasons)}" if reasons else ""
        )


def read_fasta(path: str, option: str) -> list[Peptide]:
    """Return the peptides of a FASTA file: a line `>name`, then lines of letters.

    Small letters, which mask regions, become capitals. A `*` at the end of a sequence, which
    translation writes for a stop, is dropped.

    Args:
        path: the file.
        option: names the file in messages.

    Raises:
        UserError: the file cannot be read, is empty or is no FASTA file.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"`{option}` {path!r} cannot be read: {reason}") from error
    sequences: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line.startswith(">"):
            sequences.append("")
        elif line and not sequences:
            raise UserError(
                f"`{option}` {path!r} is no FASTA file: line {number} comes before a line that "
                "begins with `>`"
            )
        elif line:
            sequences[-1] += line.upper()
    peptides = [Peptide(letters.removesuffix("*")) for letters in sequences if letters]
    if not peptides:
        raise UserError(f"`{option}` {path!r} holds no sequence")
    return peptides


def read_table(name: str, option: str) -> list[Peptide]:
    """Return the peptides of a table of modlamp, with their classes; no code of modlamp runs.

    Args:
        name: one of `TABLES`.
        option: names the table in messages.

    Raises:
        UserError: there is no such table, or modlamp is not installed.
    """
    if name not in TABLES:
        raise UserError(f"`{option}` must be one of {', '.join(TABLES)}, got {name!r}")
    spec = importlib.util.find_spec("modlamp")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / "data" / f"{name}.csv" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"`{option}: {name}` is a table of the package modlamp, which is not installed: "
            "pip install 'lightning-mpo[proteins]', or give FASTA files"
        )
    # "5200,1,UniProt,AMP": rows, columns, names of the classes 0 and 1
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    kinds, peptides = head.split(",")[2:], []
    for line in filter(None, map(str.strip, lines)):
        letters, kind = line.rsplit(",", 1)
        peptides.append(Peptide(letters.strip().upper(), kinds[int(kind)].strip()))
    return peptides


def select(
    peptides: Sequence[Peptide], shortest: int, longest: int, kind: str | None = None
) -> Selection:
    """Return the peptides of the 20 amino acids with a length in a range, each once.

    Args:
        peptides: from a source.
        shortest: fewest residues.
        longest: most residues.
        kind: the class to take; None: all.
    """
    foreign, outside = "with letters outside the 20", f"outside {shortest} to {longest} residues"
    other, again = f"of another class than {kind}", "repeated"
    chosen = Selection(left_out=dict.fromkeys((other, foreign, outside, again), 0))
    seen: set[Peptide] = set()
    for peptide in peptides:
        if kind is not None and peptide.kind != kind:
            chosen.left_out[other] += 1
        elif not set(peptide.residues) <= set(RESIDUES):
            chosen.left_out[foreign] += 1
        elif not shortest <= len(peptide.residues) <= longest:
            chosen.left_out[outside] += 1
        elif peptide in seen:
            chosen.left_out[again] += 1
        else:
            seen.add(peptide)
            chosen.peptides.append(peptide)
    return chosen
