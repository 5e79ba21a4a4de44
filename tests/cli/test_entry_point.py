"""The environment of a command, and the entry points: help, version and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo import __version__, cli, recipes
from lightning_mpo.cli import parser
from lightning_mpo.cli.main import main
from lightning_mpo.cli.mistakes import explain
from lightning_mpo.errors import UserError
from lightning_mpo.modules.parallel import check_alone
from tests.support.commands import write

# --- the environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "WORLD_SIZE"]
)
@pytest.mark.parametrize("value", ["x", "", "-1", "²"])
def test_a_process_number_that_is_none_is_refused_before_lightning_reads_it(
    monkeypatch, capsys, name, value
):
    monkeypatch.setenv(name, value)
    assert main(["fit", "-c", "missing.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"lightning-mpo: the environment variable {name} is {value!r}, which is not the number of a process"
    )


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_process_that_is_called_a_later_one_is_refused(here, call, capsys, monkeypatch, name):
    """It would train, save checkpoints and write no metrics."""
    monkeypatch.setenv(name, "3")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert call("fit", "-c", "base.yaml") == 2
    assert f"{name} is 3, which makes this one of several processes" in capsys.readouterr().err
    check_alone(SimpleNamespace(world_size=4))


def test_a_run_from_python_imports_from_the_working_folder(here, capsys, monkeypatch):
    (here / "rewards_from_here.py").write_text("def f(completions): return [1.0]\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    assert cli.run(["fit", "-c", "base.yaml", "--rollout.rewards", "[rewards_from_here.g]"]) == 2
    assert "no `g` in `rewards_from_here`" in capsys.readouterr().err


# --- the entry point ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_the_verbs(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-mpo", *arguments])
    assert main() == 0
    shown = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "methods", "-c NAME", "-c quickstart"):
        assert word in shown
    for line in shown.partition("examples:")[2].splitlines():
        for name in re.findall(r"-c (\S+)", line):
            assert recipes.find(name).is_file(), f"the help names {name}"


def test_a_reward_of_the_working_folder_is_found_by_the_console_command(here, runs, monkeypatch):
    """`lightning-mpo` has the folder of the script on its path, and not the working folder, as `python -m` has."""
    text = "from lightning_mpo.rewards import Reward\nclass Ends(Reward):\n    is_accuracy = True\n"
    text += "    def score(self, completions):\n        return [float(c.text.endswith(c.target)) for c in completions]\n"
    (here / "my_rewards_here.py").write_text(text)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    assert main(["fit", "-c", "base.yaml", "--rollout.rewards", "[my_rewards_here.Ends]"]) == 0
    (run,) = runs
    (rollout,) = [c for c in run.trainer.callbacks if type(c).__name__ == "RolloutLoop"]
    assert [type(reward).__name__ for reward in rollout.rewards] == ["Ends"]


def test_a_run_from_python_reads_files_as_the_command_line_does(here, call, runs, capsys):
    write(here / "more.yaml", {"include": "base.yaml", "trainer": {"max_steps": 2}})
    assert cli.run(["fit", "-c", "more.yaml", "--rollout.prompts", 4]) == 0
    assert runs[0].trainer.global_step == 2
    own = parser.OPTIONS | {"args": ["-c", "more.yaml"], "run": False, "save_config_callback": None}
    assert parser.CLI(**own).trainer.max_steps == 2, "with Lightning's own class as well"
    with pytest.raises(UserError, match="`include` works in files only"):
        parser.CLI(**own | {"args": {"include": ["base.yaml"]}})
    assert cli.run(["configs", "show", "grop"]) == 2
    assert cli.run(["fti"]) == 2
    assert "no verb 'fti'; did you mean `fit`?" in capsys.readouterr().err
    assert cli.run([]) == 0
    assert capsys.readouterr().out.startswith("usage: lightning-mpo")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-mpo", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"lightning-mpo {__version__}\n"


def test_help_is_quick_and_a_mistake_exits_with_two(tmp_path):
    """Help loads no large library: that takes seconds, and can be seen without a clock."""
    code = (
        "import sys; from lightning_mpo.cli.main import main; main(['--help']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: lightning-mpo"), done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "lightning_mpo.cli.main" in loaded
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(loaded)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mpo", "fot"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == "lightning-mpo: no verb 'fot'; did you mean `fit`?\n"


def _raised_by_us() -> Exception:
    """An exception that comes out of this package, as a fault of its own would."""
    from lightning_mpo.checks import within

    try:
        within("A", "no interval", x=1)
    except ValueError as error:
        return error
    raise AssertionError


def test_the_mistake_behind_an_error_is_found():
    mistake, wrapped = UserError("mend this"), ValueError("wrapped")
    wrapped.__cause__ = mistake
    assert explain(wrapped) == "mend this"
    outer = ValueError("raised while another was handled")
    outer.__context__ = wrapped
    assert explain(outer) == "mend this"
    assert explain(_raised_by_us()) is None
