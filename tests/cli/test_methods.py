"""The table of methods: its rows come from the files."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.cli import methods
from lightning_mpo.errors import UserError
from lightning_mpo.recipes import headers
from lightning_mpo.recipes.headers import FIELDS, Method, read
from tests.support.heavy import HEAVY
from tests.support.methods import FOLDER, HEADER, OBJECTIVE, ROOT, call, write

ALGORITHMS = sorted(FOLDER.glob("*.yaml"))


def cells(table: str) -> dict[str, list[str]]:
    """Return the rows of a table of Markdown by what stands in the first brackets."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].split("]")[0].strip("["): row for row in split[2:]}


# --- the files of this repository ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_a_file_has_a_whole_header_that_agrees_with_it(path):
    method = read(path)
    assert all(method.header[key] for key in ("", *FIELDS))
    assert max(map(len, path.read_text().splitlines())) <= 132


def numbers(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    pairs = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else pairs:
        yield from numbers(inner, *path, key)
        if headers.is_number(inner):
            yield (*path, key)


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_a_changed_number_leaves_no_stale_header(path):
    method = read(path)
    for *above, last in numbers(method.choices):
        choices = copy.deepcopy(method.choices)
        inner = choices
        for key in above:
            inner = inner[key]
        inner[last] += 0.125
        with pytest.raises(
            UserError, match=f"`values:` says (\\w+\\.)?{last} = .*, but `.*{last}` is"
        ):
            headers._check_values(Method(path, method.header, choices))


def test_the_page_holds_the_table():
    page = ROOT / "docs" / "methods.md"
    text = page.read_text().partition(methods.BEGIN)[2].partition(methods.END)[0]
    table = methods.table(methods.read_folder(methods.FOLDER), page)
    assert text.strip() == table.strip(), (
        "the page is behind: run `lightning-mpo methods --page docs/methods.md`"
    )
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert [Path(link).stem for link in links] == [path.stem for path in ALGORITHMS]
    assert all((page.parent / link).is_file() for link in links)


def test_a_row_says_every_choice_that_does_not_go_without_saying():
    table = methods.table(methods.read_folder(FOLDER))
    rows, note = cells(table), table.splitlines()[-1]
    assert list(rows) == [path.stem for path in ALGORITHMS]
    assert {len(row) for row in rows.values()} == {len(methods.COLUMNS)}
    for path in ALGORITHMS:
        choices = rows[path.stem][1]
        objective = read(path).choices
        pairs = [
            (axis, item)
            for axis, choice in objective.items()
            for item in (choice or [None] if isinstance(choice, list) else [choice])
        ]
        for axis, choice in pairs:
            if isinstance(choice, dict):
                said = choice.get("class_path", axis)
                assert f"`{said}(" in choices or f"`{said}`" in choices
            elif choice is None:
                assert f"no {axis}" in note
            else:
                assert f"`{choice}`" in choices or f"{axis} `{choice}`" in note


def test_rows_by_hand():
    rows = cells(methods.table(methods.read_folder(FOLDER)))
    assert (
        rows["dapo"][1]
        == "`TokenActions`, `GroupRelative(std)`, `ClippedRatio(0.2, 0.28)`, `TokenMean`"
    )
    assert rows["ppo"][1].endswith("`TokenMean`, `ValueLoss(0.1, 0.2)`")
    assert rows["mpo_rlpt"][1].startswith(
        "`TopK(16, refuse)`, `BlockActions(3, weights FutureShare(0.2), stride 1, mtp, weighted, "
        "credit StateCredit(bound))`, `GroupRelative"
    )
    assert "`KLPenalty(controller ConstantCoefficient(0.05), k1, reward, token)`" in rows["rloo"][1]
    assert "`ConstantLength(length rollout.max_new_tokens)`" in rows["dr_grpo"][1]
    assert rows["gspo"][0].endswith(": [arXiv:2507.18071](https://arxiv.org/abs/2507.18071)")
    assert rows["rlpt"][3] == "[S, I] equations not seen in print"


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_loads_nothing_heavy():
    code = (
        "import sys; from lightning_mpo.__main__ import main; sys.argv = ['lightning-mpo', 'methods']; code = main(); "
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    table = done.stdout
    assert table.replace("(configs/", "(../configs/") in (ROOT / "docs" / "methods.md").read_text()
    assert set(cells(table)) == {path.stem for path in ALGORITHMS}


def test_a_folder_of_ones_own_with_axes_of_its_own(tmp_path, monkeypatch, capsys):
    margin = {
        "class_path": "my.Margin",
        "init_args": {"margin": 0.5, "kind": "soft|hard", "side": "both", "sharp": True},
    }
    more = HEADER.replace("no KL [S]", "margin = 0.5 [I]")
    write(
        tmp_path / "a.yaml",
        more,
        {**OBJECTIVE, "penalty": margin, "kl": {"coef": 0.0003, "off": False}},
    )
    write(tmp_path / "b.yaml")
    assert call(monkeypatch, "--configs", tmp_path) == 0
    shown = capsys.readouterr().out
    rows = cells(shown)
    assert rows["a"][1] == (
        "`FullVocabulary`, `ClippedRatio(0.2, 0.2)`, `kl(0.0003)`, `upkeep(0.0003)`, `Margin(0.5, soft\\|hard, both, sharp)`"
    )
    assert rows["b"][1] == "`FullVocabulary`, `ClippedRatio(0.2, 0.2)`, `upkeep(0.0003)`"
    assert "no kl, no penalty" in shown, "an axis that a file lacks or leaves empty"
    assert "[S] second-hand" in shown
    assert "[V]" not in shown, "only tags that are used"


def test_what_nearly_all_choose_is_said_once(tmp_path):
    for n in range(5):
        write(
            tmp_path / f"{n}.yaml",
            objective={**OBJECTIVE, "support": "FullVocabulary" if n else "Other"},
        )
    table = methods.table(methods.read_folder(tmp_path))
    assert (
        "support `FullVocabulary`, surrogate `ClippedRatio(0.2, 0.2)`, no kl"
        in table.splitlines()[-1]
    )
    assert cells(table)["0"][1] == "`Other`"
    assert cells(table)["1"][1] == ""
    write(tmp_path / "1.yaml", objective={**OBJECTIVE, "support": "Other"})
    table = methods.table(methods.read_folder(tmp_path))
    assert "support `" not in table
    assert cells(table)["4"][1] == "`FullVocabulary`"


def test_a_terminal_gets_a_table_of_its_width(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call(monkeypatch) == 0
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 100
    assert "grpo: arXiv:2402.03300" in shown
    assert "](" not in shown
    assert "[P, C] Eq. 3 and the" in shown, "brackets that are no links stay"


def test_the_table_is_written_between_the_markers(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"# Above\n\n{methods.BEGIN}\nold\n{methods.END}\n\nbelow\n")
    configs = tmp_path / "configs"
    configs.mkdir()
    write(configs / "mine.yaml")
    for _ in range(2):
        assert call(monkeypatch, "--configs", configs, "--page", page) == 0
        text = page.read_text()
        assert text.startswith(f"# Above\n\n{methods.BEGIN}\n\n| method")
        assert text.endswith(f"\n\n{methods.END}\n\nbelow\n")
        assert text.count("[mine]") == 1
        assert "old" not in text
    assert capsys.readouterr().out == ""
