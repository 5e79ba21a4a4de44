"""Headers of algorithm files: values that the file does not set, and other mistakes, are refused."""

from __future__ import annotations

import pytest

from lightning_mpo.cli import methods
from lightning_mpo.errors import UserError
from lightning_mpo.recipes import headers
from lightning_mpo.recipes.headers import TAGS, read
from tests.support.methods import FOLDER, HEADER, OBJECTIVE, call, write

WRONG_HEADERS = {
    "none": ("", "must begin with a comment that says what the algorithm is"),
    "no description": (HEADER.split("\n", 2)[2], "must begin with a comment that says what the algorithm is"),
    "a sentence only": ("# Mine.\n", "lacks `# paper: …`, `# values: …`, `# confidence: …`; where nothing is known, write"),
    "no confidence": (HEADER.replace("# confidence: [C] read\n", ""), "lacks `# confidence: …`"),
    "empty paper": (HEADER.replace(" arXiv:2402.03300 [P]", ""), "lacks `# paper: …`"),
    "twice": (HEADER + "# paper: another\n", "gives `paper:` twice"),
    "stale": (HEADER.replace("high = 0.2", "high = 0.28"), "says low = 0.28, but `surrogate.low` is 0.2"),
    "no argument": (HEADER.replace("low = high", "low = hihg"), "says hihg = 0.2, but the file sets no `hihg`"),
    "other word": (HEADER.replace("no KL", "low = x"), "says low = x, but `surrogate.low` is 0.2"),
    "unnamed": (HEADER.replace("coef = 3e-4 [I]", "heads [I]"), "must say where `upkeep.coef` comes from, such as `coef = 0.0003"),
    "no source": (HEADER.replace("no KL [S]", "no KL"), "`values:` needs a source in brackets, which begins with one of P, C"),
    "unknown tag": (HEADER.replace("[C] read", "[TRL] read"), "`confidence:` needs a source in brackets"),
    "no YAML": (HEADER + "a: [\n", "is not valid YAML"),
    "no objective": (HEADER + "trainer: {max_steps: 1}\n#", "sets no `model.init_args.objective`, so it is not an algorithm"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_one_line(tmp_path, monkeypatch, capsys, name):
    header, wanted = WRONG_HEADERS[name]
    path = write(tmp_path / "mine.yaml", header)
    if header.endswith("#"):
        path.write_text(header)
    assert call(monkeypatch, "--configs", tmp_path) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"lightning-mpo: {path}")
    assert wanted in shown.err
    assert shown.err.count("\n") == 1


def test_dots_say_which_of_two_arguments_is_meant(tmp_path):
    objective = {**OBJECTIVE, "critic": {"coef": 0.5}}
    with pytest.raises(UserError, match=r"says coef = 3e-4, but `critic.coef` is 0.5"):
        read(write(tmp_path / "a.yaml", HEADER, objective))
    both = HEADER.replace("coef = 3e-4", "upkeep.coef = 3e-4, critic.coef = 0.5")
    assert read(write(tmp_path / "a.yaml", both, objective)).choices == objective


def test_words_and_switches_are_compared_too(tmp_path):
    objective = {
        **OBJECTIVE,
        "reduction": {"class_path": "R", "init_args": {"length": "${rollout.n}", "whiten": True}},
    }
    for said, ok in (
        ("length = rollout.n, whiten = true", True),
        ("length = rollout.m", False),
        ("whiten = false", False),
    ):
        path = write(tmp_path / "a.yaml", HEADER.replace("no KL", said), objective)
        if ok:
            read(path)
        else:
            with pytest.raises(UserError, match="but `reduction"):
                read(path)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--configs", "none"], "no folder 'none'; give `--configs` a folder of algorithm files"),
        (["--configs", "."], "'.' holds no .yaml file"),
        (
            ["--config", "."],
            "`methods` does not take '--config'; it takes --configs DIR and --page FILE",
        ),
        (["--configs"], "argument --configs: expected one argument"),
        (["--configs", FOLDER, "--page", "README.md"], "`--page`: no file 'README.md'"),
        (
            ["--configs", FOLDER, "--page", "bare.txt"],
            "bare.txt must hold the lines `<!-- methods: begin -->` and",
        ),
    ],
)
def test_other_mistakes_are_one_line_too(tmp_path, monkeypatch, capsys, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.txt").write_text(f"no table {methods.END}")
    assert call(monkeypatch, *arguments) == 2
    shown = capsys.readouterr().err
    assert wanted in shown
    assert shown.count("\n") == 1


def test_every_tag_has_one_meaning():
    assert len(set(TAGS.values())) == len(TAGS)
    assert all(headers.tags(f"[{tag}, TRL]") == [tag] for tag in TAGS)
