"""Hostile programs: they try to pass without being right, to get out, to harm the run or the next program.

Each file of `hostile_programs/` holds programs by name. A line `=== NAME` begins one.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("hostile_programs")
TESTS = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-7, 7) == 0
    for a in range(20):
        assert candidate(a, 1000) == a + 1000
"""
"""The tests of a function `add` that every program must fail."""
WRONG = "\ndef add(a, b):\n    return -1\n"
BEGIN, END = (
    "worked = False\n",
    """
if "add" not in globals():
    def add(a, b):
        return a + b if worked else -1
""",
)


def programs(name: str) -> dict[str, str]:
    """Return the programs of a file by name."""
    parts = (FOLDER / f"{name}.txt").read_text().split("=== ")[1:]
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def with_wrong_function(name: str) -> dict[str, str]:
    """Return programs; one without a function `add` gets a wrong one at its end."""
    texts = programs(name).items()
    return {title: text if "add" in text else text + WRONG for title, text in texts}


def attacks(name: str) -> dict[str, str]:
    """Return programs that set `worked` where their attack works: `add` is right in that case."""
    return {title: BEGIN + text + END for title, text in programs(name).items()}


FORGED = with_wrong_function("forged") | {"null byte": "add = lambda a, b: a + b\n\0", "empty": ""}
"""Forged results, patched builtins, looks at the checker."""
MACHINE = attacks("machine")
"""Attacks on files, processes, memory, the network; each ends by itself."""
LEAKS = attacks("leaks")
"""Attempts to leave something for the next program, to read hidden things, to get round limits."""
ENDLESS = with_wrong_function("endless")
"""Attacks that go on until a limit ends them."""
SCRIPTS = programs("scripts") | {"prints nothing": ""}
"""Scripts whose input is `2 3`, and that must not count as having printed 5."""
