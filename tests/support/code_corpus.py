"""A folder of Python files with everything that a corpus must cope with."""

from __future__ import annotations

import string
from pathlib import Path

from lightning_mpo.policies import TinyPolicy

CHARACTERS = "".join(chr(i) for i in range(32, 127)) + "\n"
GOOD = '''"""A module.

    x = 1
"""

import os


@property
def first(
    a, b
):
    """Text."""
    if a: return 1

    total = [
        a,
    ]; b = """
  text = 2
"""; c = 3
    return total + \\
        [b]
'''
STARTS = ["import os", "@property", "if a: return 1", "total = [", "return total + \\"]
"""The lines of `GOOD` that begin a statement."""


def write_corpus(folder: Path, files: int = 12) -> Path:
    """Write usable files, and one of each kind that is skipped."""
    (folder / "inner").mkdir(parents=True)
    for n in range(files):
        name = f"inner/file_{n}.py" if n % 2 else f"file_{n}.py"
        body = "".join(
            f"    value_{letter} = {n} + len(names)\n" for letter in string.ascii_lowercase
        )
        (folder / name).write_text(f"names = [{n}]\n\n\ndef work_{n}():\n{body}    return names\n")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "tabs.py").write_text("def f():\n\treturn 1\n")
    (folder / "windows.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (folder / "latin.py").write_bytes(b"x = '\xe9'\n")
    (folder / "empty.py").write_text("# nothing\n")
    (folder / "notes.txt").write_text("no Python")
    return folder


def tiny(**options) -> TinyPolicy:
    """Return a tiny policy whose alphabet is ASCII."""
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 1024}
    return TinyPolicy(characters=CHARACTERS, **(sizes | options))
