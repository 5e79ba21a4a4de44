"""Recipes by name: which file a name means, what it includes, and what `lightning-mpo configs` prints and writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_mpo import recipes
from lightning_mpo.__main__ import main
from lightning_mpo.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, far from any checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def key_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def write(path: str, content: object) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(content))
    return Path(path)


def content(arguments: list[str]) -> list[object]:
    """Return what an expanded command line reads, in order, without `include` and `warmup`, and its other options."""
    read = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "-c":
            loaded = yaml.safe_load(Path(argument).read_text())
            read.append(
                {key: value for key, value in loaded.items() if key not in ("include", "warmup")}
            )
        elif argument != "-c":
            read.append(argument if not argument.startswith("--warmup=") else "--warmup")
    return read


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=key_of)
def test_every_recipe_is_found_by_its_name_and_expands_as_its_file(path):
    name = key_of(path)
    assert recipes.find(name).samefile(path)
    assert recipes.find(path.stem).samefile(path), "no two recipes have one name"
    assert recipes.name_of(recipes.find(name)) == name
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
        (b"a: [", "mine.yaml is no valid YAML"),
        (b"a: caf\xe9", "mine.yaml is no UTF-8 text (byte 6): save it as UTF-8"),
        (b"a: \x00", "mine.yaml is no valid YAML"),
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


# --- lightning-mpo configs ----------------------------------------------------------------------------------------------


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
    assert "Dr. GRPO: no division by the group's standard deviation, no scaling" in shown
    folders = [line.partition(":")[0] for line in lines if line and line[0] != " "][:-3]
    assert folders == ["experiment", "algorithm", "model", "data", "hardware", "report"]


def test_show_prints_the_file(capsys):
    for name in ("grpo", "algorithm/grpo"):
        assert call(capsys, "show", name) == (
            0,
            (CONFIGS / "algorithm" / "grpo.yaml").read_text(),
            "",
        )


@pytest.mark.parametrize("path", FILES, ids=key_of)
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
