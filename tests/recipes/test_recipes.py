"""Recipes by name: which file a name means, what it includes, and its warm-up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_mpo import recipes
from lightning_mpo.__main__ import main
from lightning_mpo.errors import UserError
from tests.support.recipe_files import CONFIGS, FILES, content, key_of, write


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, far from any checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=key_of)
def test_every_recipe_is_found_by_its_name_and_expands_as_its_file(path):
    name = key_of(path)
    assert recipes.find(name).samefile(path)
    assert recipes.find(path.stem).samefile(path), "no two recipes have one name"
    assert recipes.name_of(recipes.find(name)) == name
    if recipes.stages_of(path):
        with pytest.raises(UserError, match="is a list of stages, which `fit` runs"):
            recipes.expand(["plan", "-c", name])
        return
    assert content(recipes.expand(["fit", "-c", name])) == content(
        recipes.expand(["fit", "-c", str(path)])
    )


@pytest.mark.parametrize(
    "given", [["-c", "grpo"], ["--config", "grpo"], ["--config=grpo"], ["-cgrpo"], ["-c=grpo"]]
)
def test_each_way_to_give_a_file_expands(given):
    write("mine.yaml", {"include": "grpo"})
    grpo = str(recipes.find("algorithm/grpo"))
    assert recipes.expand(["fit", *given, "--x", "1"]) == [
        "fit",
        "-c",
        grpo,
        "--x",
        "1",
        "--include=null",
    ]
    mine = [word.replace("grpo", "mine.yaml") for word in given]
    assert recipes.expand(["fit", *mine])[1:5] == ["-c", grpo, "-c", "mine.yaml"]


def test_arguments_without_files_stay_as_they_are():
    assert recipes.expand(["fit", "--trainer.max_steps", "3"]) == [
        "fit",
        "--trainer.max_steps",
        "3",
    ]
    assert recipes.expand([]) == []


def test_a_file_wins_over_the_recipe_of_that_name():
    write("grpo", {"rollout": {"prompts": 3}})
    assert recipes.find("grpo") == Path("grpo")
    Path("gspo").mkdir()
    assert recipes.find("gspo").is_file(), "a folder is no file"


def test_a_file_with_an_ending_beside_the_name_is_refused_as_one_may_mean_either():
    write("grpo.yaml", {})
    with pytest.raises(
        UserError, match="'grpo' is a recipe, .*write `grpo.yaml` or `algorithm/grpo`"
    ):
        recipes.expand(["fit", "-c", "grpo"])
    assert recipes.find("algorithm/grpo").is_file()
    write("algorithm/grpo.yaml", {})
    with pytest.raises(
        UserError, match=r"write `algorithm/grpo.yaml` or `/.*configs/algorithm/grpo.yaml`"
    ):
        recipes.find("algorithm/grpo")


def test_a_name_of_two_recipes_is_refused(monkeypatch, tmp_path):
    for folder in ("model", "data"):
        write(f"shipped/{folder}/svamp.yaml", {})
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "shipped")
    with pytest.raises(
        UserError, match="'svamp' is the name of 2 recipes: write `data/svamp` or `model/svamp`"
    ):
        recipes.find("svamp")
    assert recipes.find("model/svamp").parent.name == "model"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("quikstart", "no configuration file or recipe 'quikstart'; did you mean `quickstart`?"),
        ("GRPO", "no configuration file or recipe 'GRPO'; did you mean `algorithm/grpo`?"),
        (
            "algorithm/grop",
            "no configuration file or recipe 'algorithm/grop'; did you mean `algorithm/grpo`?",
        ),
        (
            "grpo.yaml",
            "no configuration file 'grpo.yaml'; a recipe has no ending: write `algorithm/grpo`",
        ),
        ("configs/algorithm/gspo.yaml", "a recipe has no ending: write `algorithm/gspo`"),
        ("mone.yaml", "no configuration file 'mone.yaml'; did you mean `mine.yaml`?"),
        (
            "zzzzz",
            "no configuration file or recipe 'zzzzz'; `lightning-mpo configs` lists the recipes",
        ),
        (
            "zz/zz.yaml",
            "no configuration file 'zz/zz.yaml'; `lightning-mpo configs` lists the recipes",
        ),
        ("", "no configuration file or recipe ''; `lightning-mpo configs` lists the recipes"),
        (".", "no configuration file or recipe '.'; `lightning-mpo configs` lists the recipes"),
        ("folder", "no configuration file or recipe 'folder'"),
    ],
)
def test_a_name_of_nothing_is_one_line(name, wanted):
    write("mine.yaml", {})
    Path("folder").mkdir()
    with pytest.raises(UserError) as refused:
        recipes.expand(["fit", "-c", name])
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            b"include: grop",
            "mine.yaml: no configuration file or recipe 'grop'; did you mean `grpo`?",
        ),
        (
            b"include: [3]",
            "`include:` of mine.yaml must be the name of a file, or a list of names, got [3]",
        ),
        (
            b"include: {a: b}",
            "`include:` of mine.yaml must be the name of a file, or a list of names, got {'a': 'b'}",
        ),
        (b"include: mine.yaml", "these files `include:` each other: mine.yaml"),
        (b"- a", "mine.yaml must hold a mapping of options, got list"),
        (b"", "mine.yaml must hold a mapping of options, got nothing"),
        (b"a: [", "mine.yaml is not valid YAML"),
        (b"a: caf\xe9", "mine.yaml is not UTF-8 text (byte 6): save it as UTF-8"),
        (b"a: \x00", "mine.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_none_is_one_line(text, wanted):
    Path("mine.yaml").write_bytes(text)
    with pytest.raises(UserError) as refused:
        recipes.expand(["fit", "-c", "mine.yaml"])
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_left_out():
    with pytest.raises(UserError, match="`-c` needs a configuration file or the name of a recipe"):
        recipes.expand(["fit", "-c"])


# --- warm-ups -----------------------------------------------------------------------------------------------------------


def stage(*arguments: str) -> list[str]:
    return [
        word.removeprefix("--warmup=")
        for word in recipes.expand(list(arguments))
        if word.startswith("--warmup=")
    ]


def test_a_recipes_warm_up_is_called_by_name_wherever_the_package_is():
    assert stage("fit", "-c", "quickstart") == ["experiment/quickstart_warmup"]
    assert stage("fit", "-c", str(CONFIGS / "experiment" / "quickstart.yaml")) == [
        "experiment/quickstart_warmup"
    ]


def test_a_warm_up_is_relative_to_its_file_then_to_the_working_folder_then_a_name():
    write("deep/run.yaml", {"warmup": "first.yaml"})
    assert stage("fit", "-c", "deep/run.yaml") == [], (
        "there is none: the run says so where it is needed"
    )
    write("first.yaml", {})
    assert stage("fit", "-c", "deep/run.yaml") == ["first.yaml"]
    write("deep/first.yaml", {})
    assert stage("fit", "-c", "deep/run.yaml") == ["deep/first.yaml"]
    write("named.yaml", {"warmup": "quickstart_warmup"})
    assert stage("fit", "-c", "named.yaml") == ["experiment/quickstart_warmup"]
    write("experiment/quickstart_warmup.yaml", {})
    (path,) = stage("fit", "-c", "quickstart")
    assert Path(path).samefile(CONFIGS / "experiment" / "quickstart_warmup.yaml"), (
        "the recipe's, whatever is here"
    )


def test_a_later_file_and_the_command_line_change_the_warm_up():
    write("none.yaml", {"warmup": None})
    words = recipes.expand(["fit", "-c", "quickstart", "-c", "none.yaml", "--warmup", "other.yaml"])
    places = [
        words.index("--warmup=experiment/quickstart_warmup"),
        words.index("none.yaml"),
        words.index("--warmup"),
    ]
    assert places == sorted(places)


# --- the working folder -------------------------------------------------------------------------------------------------


def test_modules_of_the_working_folder_can_be_imported_as_with_python_m(monkeypatch, capsys, here):
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])
    assert str(here) not in sys.path
    assert main(["configs"]) == 0
    assert sys.path[0] == str(here)
    assert main(["configs"]) == 0
    assert sys.path.count(str(here)) == 1


def test_a_working_folder_that_is_gone_stops_nothing(monkeypatch, capsys, here):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    before = list(sys.path)
    assert main(["--version"]) == 0
    assert sys.path == before
