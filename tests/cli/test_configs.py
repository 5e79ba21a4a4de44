"""`lightning-mpo configs` lists, shows and copies recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mpo import recipes
from lightning_mpo.__main__ import main
from tests.support.recipe_files import CONFIGS, FILES, content, key_of, write


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch) -> None:
    """An empty working folder, far from any checkout."""
    monkeypatch.chdir(tmp_path)


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["configs", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_list_has_every_recipe_with_the_first_sentence_of_its_header(capsys):
    code, shown, _ = call(capsys)
    assert code == 0
    lines = shown.splitlines()
    for path in FILES:
        (line,) = [
            line for line in lines if line.split()[:1] == [path.stem] and line.startswith("  ")
        ]
        begin = path.read_text().splitlines()[0].removeprefix("# ").split()[:4]
        assert line.split()[1:5] == begin
    assert "Dr. GRPO: no division by the group's standard deviation or by" in shown
    folders = [line.partition(":")[0] for line in lines if line and line[0] != " "][:-3]
    assert folders == ["experiment", "algorithm", "model", "data", "hardware", "report"]


def test_show_prints_the_file(capsys):
    for name in ("grpo", "algorithm/grpo"):
        assert call(capsys, "show", name) == (
            0,
            (CONFIGS / "algorithm" / "grpo.yaml").read_text(),
            "",
        )


LISTS = [path for path in FILES if recipes.stages_of(path)]


@pytest.mark.parametrize("path", LISTS, ids=key_of)
def test_a_copy_of_a_list_leads_to_copies_of_its_stages(path, capsys):
    stages = recipes.stages_of(path).values()
    assert call(capsys, "copy", key_of(path), "mine")[0] == 0
    copies = recipes.stages_of(Path("mine", path.parent.name, path.name)).values()
    assert all(str(copy).startswith("mine/") for copy in copies)
    assert [copy.read_text() for copy in copies] == [stage.read_text() for stage in stages]
    assert call(capsys, "copy", key_of(path), "one.yaml")[0] == 0
    assert "_stage.yaml" not in Path("one.yaml").read_text()
    others = recipes.stages_of(Path("one.yaml")).values()
    assert [*map(recipes.name_of, others)] == [*map(recipes.name_of, stages)]


@pytest.mark.parametrize("path", [path for path in FILES if path not in LISTS], ids=key_of)
def test_a_copy_is_the_recipe_as_a_folder_and_as_one_file(path, capsys):
    original = content(recipes.expand(["fit", "-c", str(path)]))
    code, shown, _ = call(capsys, "copy", key_of(path), "mine")
    assert code == 0
    copied = Path("mine", path.parent.name, path.name)
    assert f"written    {copied}" in shown
    assert f"-c {copied}" in shown.splitlines()[-1]
    expanded = recipes.expand(["fit", "-c", str(copied)])
    assert content(expanded) == original
    files = [
        word for before, word in zip(["", *expanded], expanded, strict=False) if before == "-c"
    ]
    files += [word.removeprefix("--warmup=") for word in expanded if word.startswith("--warmup=")]
    assert all(file.startswith("mine/") for file in files), "a copy leads to copies"
    assert call(capsys, "copy", key_of(path), "one.yaml")[0] == 0
    assert content(recipes.expand(["fit", "-c", "one.yaml"])) == original
    head, copy = path.read_text().splitlines()[0], Path("one.yaml").read_text()
    assert copy.startswith(head)
    assert "../" not in copy


def test_nothing_is_overwritten(capsys):
    assert call(capsys, "copy", "quickstart")[0] == 0
    hardware, experiment = (
        Path("configs/hardware/cpu.yaml"),
        Path("configs/experiment/quickstart.yaml"),
    )
    hardware.write_text("trainer: {devices: 2}\n")
    code, shown, _ = call(capsys, "copy", "quickstart")
    assert code == 0
    assert "kept       configs/hardware/cpu.yaml, which differs from the recipe" in shown
    assert "kept       configs/experiment/quickstart.yaml, the same" in shown
    assert "written" not in shown
    experiment.write_text("{}")
    code, shown, said = call(capsys, "copy", "quickstart")
    assert (code, shown) == (2, "")
    assert (
        "configs/experiment/quickstart.yaml exists and differs from the recipe; give another"
        in said
    )
    assert hardware.read_text() == "trainer: {devices: 2}\n"
    assert experiment.read_text() == "{}"
    Path("mine.yaml").write_text("{}")
    assert (
        call(capsys, "copy", "gspo", "mine.yaml")[2]
        == "lightning-mpo: mine.yaml exists; give another file\n"
    )
    Path("file").touch()
    assert "'file' is a file; give a folder" in call(capsys, "copy", "gspo", "file")[2]
    assert "file/mine.yaml cannot be written: " in call(capsys, "copy", "gspo", "file/mine.yaml")[2]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["quickstart"],
            "`configs` does not take 'quickstart'; `lightning-mpo configs show quickstart` prints the recipe",
        ),
        (["list"], "`configs` does not take 'list'; it takes copy NAME [DEST] and show NAME"),
        (["copy"], "`configs copy` takes NAME [DEST]: lightning-mpo configs copy NAME [DEST]"),
        (["copy", "grpo", "a", "b"], "`configs copy` takes NAME [DEST]"),
        (["copy", "grpo", "--force"], "`configs copy` has no option '--force'"),
        (["show", "grop"], "no configuration file or recipe 'grop'; did you mean `grpo`?"),
        (
            ["show", "mine.yaml"],
            "'mine.yaml' is a file, not a recipe; `lightning-mpo configs` lists the recipes",
        ),
        (["show"], "`configs show` takes NAME: lightning-mpo configs show NAME"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, wanted):
    write("mine.yaml", {})
    code, shown, said = call(capsys, *arguments)
    assert (code, shown) == (2, "")
    assert said.startswith("lightning-mpo: ")
    assert wanted in said
    assert said.count("\n") == 1


def test_help(capsys):
    assert call(capsys, "--help")[1].startswith("usage: lightning-mpo configs")
