"""A list of stages: its commands, the order, what is done, and what continues."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from lightning_mpo import cli
from lightning_mpo.cli import stage_entry, stage_runs, stages
from lightning_mpo.errors import UserError
from lightning_mpo.storage.lock import FolderLock

RA3 = [
    {"name": "e_step", "config": "e.yaml", "from": "m_step", "options": ["--rollout.seed=${round}"]},
    {"name": "notes", "config": "e.yaml", "verb": "annotate", "from": "e_step"},
    {"name": "m_step", "config": "m.yaml", "from": "m_step", "options": ["--data.paths=[${stages.notes}]"]},
]  # fmt: skip
CHECKPOINTS = {"e_step": Path("last.ckpt"), "m_step": Path("checkpoints/last.ckpt")}
FROM = "--model.init_args.policy.init_args.checkpoint"
E_STEP, FIRST_M = "run/round_%d/e_step/last.ckpt", "run/round_1/m_step/checkpoints/last.ckpt"
ROOT = "--trainer.default_root_dir"


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Write a list of stages; return the words of its command line."""
    monkeypatch.chdir(tmp_path)
    for name in ("e", "m", "more"):
        Path(f"{name}.yaml").write_text("{}")

    def write(*more, stages=RA3, **keys):
        content = {"folder": "run", "rounds": 2, "stages": stages} | keys
        Path("list.yaml").write_text(yaml.safe_dump(content))
        return ["-c", "list.yaml", *more]

    return write


@pytest.fixture
def started(listed, monkeypatch):
    """Write down the commands of a list instead of running them; each writes its result."""
    commands: list[list[str]] = []
    codes: dict[str, int] = {}

    def run(command):
        words = command[3:]
        commands.append(words)
        folder = Path(words[words.index("--to" if words[0] == "annotate" else ROOT) + 1])
        assert words[0] == "fit" or not folder.exists(), "annotate needs an empty folder"
        result = folder / CHECKPOINTS.get(folder.name, Path("thoughts.json"))
        code = codes.pop(str(folder), 0)
        if code >= 0:  # it has saved
            result.parent.mkdir(parents=True, exist_ok=True)
            result.touch()
        if words[0] == "fit":
            (folder / "metrics.csv").write_text("step\n0\n")
        return code

    monkeypatch.setattr(stage_entry, "run_stage", run)
    monkeypatch.setattr(stage_runs, "check_annotate", lambda words: None)
    monkeypatch.setattr(
        stage_runs, "check_fit", lambda words, folder, has_data: CHECKPOINTS[folder.name]
    )
    return commands, codes


def fit(words) -> int:
    return cli.run(["fit", *words])


def stages_with_metrics() -> list[str]:
    table = Path("run/metrics.csv")
    rows = csv.DictReader(table.read_text().splitlines()) if table.exists() else ()
    return [f"run/round_{row['round']}/{row['stage']}" for row in rows]


def place(words) -> str:
    return words[-1]


EXPECTED = [
    ["fit", "-c", "e.yaml", "--rollout.seed=1", ROOT, "run/round_1/e_step"],
    ["annotate", "-c", "e.yaml", "--checkpoint", E_STEP % 1, "--to", "run/round_1/notes", ROOT, "run/round_1/notes"],
    ["fit", "-c", "m.yaml", "--data.paths=[run/round_1/notes]", ROOT, "run/round_1/m_step"],
    ["fit", "-c", "e.yaml", "--rollout.seed=2", FROM, FIRST_M, ROOT, "run/round_2/e_step"],
    ["annotate", "-c", "e.yaml", "--checkpoint", E_STEP % 2, "--to", "run/round_2/notes", ROOT, "run/round_2/notes"],
    ["fit", "-c", "m.yaml", "--data.paths=[run/round_2/notes]", FROM, FIRST_M, ROOT, "run/round_2/m_step"],
]  # fmt: skip


def test_stages_run_in_order_and_only_once(started, listed, capsys):
    assert fit(listed()) == 0
    assert started[0] == EXPECTED
    assert fit(listed()) == 0
    assert started[0] == EXPECTED, "all stages have ended"
    assert capsys.readouterr().out.count("is done") == 6
    assert fit(listed("--rounds", "3")) == 0
    assert [words[-1] for words in started[0][6:]] == [
        f"run/round_3/{name}" for name in ("e_step", "notes", "m_step")
    ]


def test_other_files_and_options_go_to_every_stage(started, listed):
    assert fit(listed("-c", "more.yaml", "--seed_everything", "3", "--folder=other")) == 0
    assert [words[-6:-2] for words in started[0][:1]] == [
        ["-c", "more.yaml", "--seed_everything", "3"]
    ]
    assert all(words[-1].startswith("other/round_") for words in started[0])
    assert all("more.yaml" in words for words in started[0])


def test_a_file_that_includes_a_list_changes_it(started, listed):
    listed()
    Path("mine.yaml").write_text("{include: [list.yaml], rounds: 1}")
    assert fit(["-c", "mine.yaml"]) == 0
    assert started[0] == EXPECTED[:3]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_stage_continues(started, listed, number, saved, capsys):
    commands, codes = started
    codes[EXPECTED[number][-1]] = 3 if saved else -9
    assert fit(listed()) == 2
    assert commands == EXPECTED[: number + 1], "no stage after the one that failed"
    assert stages_with_metrics() == [place(words) for words in EXPECTED[:number] if "fit" in words]
    assert f"failed with exit code {3 if saved else -9}" in capsys.readouterr().err
    assert fit(listed()) == 0
    again, *others = commands[number + 1 :]
    trains = again[0] == "fit"
    name = again[-3].rsplit("/", 1)[-1] if trains and saved else again[-1].rsplit("/", 1)[-1]
    resume = (
        ["--ckpt_path", f"{EXPECTED[number][-1]}/{CHECKPOINTS[name]}"] if trains and saved else []
    )
    assert again == EXPECTED[number] + resume
    assert others == EXPECTED[number + 1 :]
    assert stages_with_metrics() == [place(words) for words in EXPECTED if "fit" in words]


def test_a_stage_that_is_asked_to_end_ends_the_run_with_0(started, listed, capsys):
    commands, codes = started
    codes["run/round_1/m_step"] = stage_entry.EARLY
    with pytest.raises(SystemExit) as stop:
        fit(listed())
    assert stop.value.code == 0
    assert "round_1/m_step was stopped; the same command goes on" in capsys.readouterr().out
    assert fit(listed()) == 0
    assert commands[3][-2:] == ["--ckpt_path", "run/round_1/m_step/checkpoints/last.ckpt"]
    assert commands[4:] == EXPECTED[3:]


def test_a_result_behind_a_stage_that_has_not_ended_is_refused(started, listed, capsys):
    assert fit(listed()) == 0
    Path("run/round_1/e_step/last.ckpt").unlink()
    assert fit(listed()) == 2
    assert "run/round_1/notes is there, and stage round_1/e_step, which" in capsys.readouterr().err
    # a stage that was begun counts, too
    shutil.rmtree("run")
    started[1]["run/round_1/notes"] = -9
    assert fit(listed()) == 2
    Path("run/round_1/e_step/last.ckpt").unlink()
    assert fit(listed()) == 2
    assert "has not ended: move it away, or give another `folder`" in capsys.readouterr().err
    assert len(started[0]) == 6 + 2


def test_a_stage_that_writes_nothing(started, listed, monkeypatch, capsys):
    monkeypatch.setattr(stage_entry, "run_stage", lambda command: 0)
    assert fit(listed()) == 2
    assert (
        "stage 'round_1/e_step' did not write 'run/round_1/e_step/last" in capsys.readouterr().err
    )


def test_commands_are_printed_and_not_run(started, listed, capsys):
    assert fit(listed("--print_config")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"lightning-mpo {' '.join(EXPECTED[0])}"
    assert len(lines) == 6
    assert started[0] == []
    assert not Path("run").exists()


def test_the_warm_up_and_a_stage_start_the_same_program(listed):
    entry = stage_entry.Entry("stage", "x", ("fit",), "run/last.ckpt", "x")
    code = f"import sys; sys.exit(sys.argv[1:] != {['a', 'b']})"
    assert stage_entry.run_stage([sys.executable, "-c", code, "a", "b"]) == 0
    assert not entry.is_done


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "LOCAL_RANK"])
def test_no_stage_runs_beside_other_processes(started, listed, monkeypatch, variable, capsys):
    monkeypatch.setenv(variable, "2")
    assert fit(listed()) == 2
    assert "run it without a launcher" in capsys.readouterr().err
    assert started[0] == []


def test_no_list_runs_twice_at_a_time(started, listed, capsys):
    lock = FolderLock(Path("run"))
    assert fit(listed()) == 2
    assert "another run (process" in capsys.readouterr().err
    lock.release()
    assert started[0] == []
    assert fit(listed()) == 0


# --- mistakes in a list ---------------------------------------------------------------------------

STAGE = {"name": "a", "config": "e.yaml"}
NOTES = {"name": "n", "config": "e.yaml", "verb": "annotate", "from": "a"}
MISTAKES = [
    ({"rounds": 0}, "`rounds` must be a number from 1 to 9999, got 0"),
    ({"rounds": 1.5}, "`rounds` must be a number from 1 to 9999, got 1.5"),
    ({"folder": None}, "`folder` must be the folder of the run with stages, got None"),
    ({"model": {}}, "has stages and `model`: give such options to the configurations"),
    ({"stages": []}, "`stages` must be a list of stages, got []"),
    ({"stages": "e.yaml"}, "`stages` must be a list of stages, got 'e.yaml'"),
    ({"stages": ["e.yaml"]}, "stage 1 of `stages` must be a mapping, got 'e.yaml'"),
    ({"stages": [{"config": "e.yaml"}]}, "stage 1 of `stages` needs `name`, a word, got None"),
    ({"stages": [STAGE | {"name": "a/b"}]}, "stage 1 of `stages` needs `name`, a word, got 'a/b'"),
    ({"stages": [STAGE | {"form": "b"}]}, "stage 'a' has no option `form`; it takes name, config"),
    ({"stages": [{"name": "a"}]}, "stage 'a' needs `config`, its configuration, got None"),
    ({"stages": [STAGE | {"config": "none.yaml"}]}, "no configuration file 'none.yaml'"),
    ({"stages": [STAGE | {"verb": "plan"}]}, "`verb` of stage 'a' must be one of fit, annotate"),
    (
        {"stages": [STAGE | {"when": "once"}]},
        "`when` of stage 'a' must be one of every, first, last",
    ),
    ({"stages": [STAGE | {"options": "--x 3"}]}, "`options` of stage 'a' must be a list of texts"),
    ({"stages": [STAGE, STAGE]}, "two stages are called 'a': give each a name"),
    ({"stages": [STAGE | {"from": "b"}]}, "stage 'a' names 'b', which is no stage; there are a"),
    ({"stages": [STAGE | {"from": 3}]}, "stage 'a' names 3, which is no stage; there are a"),
    ({"stages": [STAGE | {"options": ["${stages.b}"]}]}, "stage 'a' names 'b', which is no stage"),
    (
        {"stages": [STAGE | {"from": "n"}, NOTES]},
        "stage 'a' starts from 'n', which writes no checkpoint: its verb is `annotate`",
    ),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_a_mistake_in_a_list_is_one_line(started, listed, keys, message, capsys):
    assert fit(listed(**keys)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert started[0] == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([NOTES | {"from": "n"}, STAGE], "starts from 'n', which writes no checkpoint"),
        ([NOTES, STAGE], "stage 'n' needs `from`, a stage before it that trains"),
        (
            [STAGE | {"options": ["${stages.n}"]}, NOTES],
            "stage 'a' uses ${stages.n} in round 1, and no stage of that name has run before it",
        ),
    ],
)
def test_a_stage_needs_results_of_stages_before_it(started, listed, entries, message, capsys):
    assert fit(listed(stages=entries)) == 2
    assert message in capsys.readouterr().err
    assert started[0] == []


def test_a_list_continues_by_itself(started, listed, capsys):
    assert fit(listed("--ckpt_path", "last")) == 2
    assert "stages continue by themselves: leave out `--ckpt_path`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "plan", "export", "annotate"])
def test_other_verbs_take_one_stage(listed, verb, capsys):
    words = listed("--checkpoint", "x", "--to", "y") if verb in ("export", "annotate") else listed()
    Path("x").touch()
    assert cli.run([verb, *words]) == 2
    if verb != "export":  # which looks at the checkpoint first
        assert "list.yaml is a list of stages, which `fit` runs" in capsys.readouterr().err


def test_a_run_without_stages_is_no_list(listed):
    assert stages.find_list(["-c", "e.yaml", "--x", "3"]) is None
    with pytest.raises(UserError, match="needs a configuration file"):
        stages.find_list(["-c"])
