"""The runner of the tables of mistakes in `tests/cli/mistakes`.

python -m tests.support.mistakes      prints the tables of inputs and messages
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lightning_mpo.policies import CausalPolicy, MaskedPolicy, TinyMaskedPolicy, TinyPolicy
from tests.support.configurations import BASE

POLICY = "model.init_args.policy"
OBJECTIVE = "--model.init_args.objective"
OVERLAY = ["-c", "o.yaml"]


@dataclass(frozen=True)
class Case:
    """A mistake.

    Args:
        message: a part of the message; `…` stands for any text.
        arguments: after `fit -c base.yaml`.
        files: written beforehand.
        verb: instead of `fit`.
        without: a section of the base that is left out.
        late: found only once the policy has sampled.
    """

    message: str
    arguments: Sequence[str] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    verb: str = "fit"
    without: str = ""
    late: bool = False


def axis(text: str) -> dict[str, str]:
    """Overlay: axes of the objective."""
    return {"o.yaml": f"model: {{init_args: {{objective: {{{text}}}}}}}"}


@dataclass
class Outcome:
    code: int | str
    stderr: str
    loaded: bool
    left: list[str]


def run_case(case: Case, folder: Path) -> Outcome:
    """Run a case in this process; what it raises instead of returning a code is told by name."""
    from lightning_mpo.__main__ import main as command

    base = yaml.safe_load(BASE)
    base.pop(case.without, None)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    loads: list[type] = []
    owners = (CausalPolicy, TinyPolicy, MaskedPolicy, TinyMaskedPolicy)
    saved = {owner: owner.load_network for owner in owners}

    def spy(owner):
        return lambda self: (loads.append(owner), saved[owner](self))[1]

    argv, path, here, stderr = sys.argv, list(sys.path), os.getcwd(), io.StringIO()
    try:
        for owner in saved:
            owner.load_network = spy(owner)
        os.chdir(folder)
        sys.argv = ["lightning-mpo", case.verb, "-c", "base.yaml", *case.arguments]
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code: int | str = command()
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        os.chdir(here)
        sys.argv, sys.path[:] = argv, path
        for owner, method in saved.items():
            owner.load_network = method
    known = {"base.yaml", "__pycache__", *(name.split("/")[0] for name in case.files)}
    left = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and str(p.relative_to(folder)).split("/")[0] not in known
    )
    return Outcome(code, stderr.getvalue(), bool(loads), left)


def check_message(case: Case, folder: Path) -> None:
    """Check that a mistake ends in one line with the message, before a model is loaded."""
    outcome = run_case(case, folder)
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    line = lines[-1]
    assert [text.startswith("lightning-mpo: ") for text in lines].count(True) == 1
    assert line.startswith("lightning-mpo: ")
    assert case.late or len(lines) == 1, "a late mistake may follow warnings"
    assert len(line) < 450
    position = 0
    for part in case.message.split("…"):
        assert part in line[position:], f"{part!r} is missing in: {line}"
        position = line.index(part, position)
    assert "Traceback" not in outcome.stderr
    assert outcome.loaded == case.late, (
        "a model was loaded before the mistake was reported" if outcome.loaded else "sampled"
    )
    assert not [path for path in outcome.left if path.endswith(".ckpt")], (
        "a checkpoint of a run that never trained"
    )
    if not case.late:
        assert outcome.left == [], "a run folder of a run that never began"


def main() -> None:
    """Print each mistake with its message."""
    tables = (Path(__file__).parents[1] / "cli" / "mistakes").glob("test_*.py")
    modules = (
        importlib.import_module(f"tests.cli.mistakes.{path.stem}") for path in sorted(tables)
    )
    for name, case in (item for module in modules for item in module.CASES.items()):
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_case(case, Path(folder))
        message = outcome.stderr.strip() if outcome.code == 2 else f"!! {outcome.code}"
        print(
            f"{name:42} | {'loaded' if outcome.loaded else '      '} | {' '.join(outcome.left)[:60]} | {message}"
        )


if __name__ == "__main__":
    main()
