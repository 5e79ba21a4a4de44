"""Random peptides, and a package that looks like modlamp."""

from __future__ import annotations

import random
from pathlib import Path

from lightning_mpo.peptide_files import RESIDUES


def drawn(count: int, seed: int = 0, length: int = 12) -> list[str]:
    """Return peptides of which about two begin with the same four residues."""
    numbers = random.Random(seed)
    heads = ["".join(numbers.choices(RESIDUES, k=4)) for _ in range(count // 2)]
    tails = ["".join(numbers.choices(RESIDUES, k=length - 4)) for _ in range(count)]
    return [numbers.choice(heads) + tail for tail in tails]


def write_modlamp(folder: Path) -> Path:
    """Write a package with a table of 40 peptides, which raises if it is imported.

    Returns:
        The folder to put on `sys.path`.
    """
    package = folder / "site" / "modlamp"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    rows = [f"{letters}, {i % 2}" for i, letters in enumerate(drawn(40))]
    (package / "data" / "AMPvsUniProt.csv").write_text("\n".join(["40,1,UniProt,AMP", *rows]))
    return package.parent
