"""The verb `rewards-check`: its table, flags, exit codes, and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_mpo.cli import rewards_check as command
from lightning_mpo.policies import TinyPolicy

FAULTY = """\
import time

def substring(completions, target):
    return [float(t in text) for text, t in zip(completions, target)]

def hangs(completions):
    if "" in completions:
        time.sleep(100)
    return [float(len(text)) for text in completions]

def exits(completions):
    if any("\\0" in text for text in completions):
        raise SystemExit(0)
    return [float(len(text)) for text in completions]
"""
ACCURACY = "[{class_path: FunctionReward, init_args: {function: 'faulty.py:%s', accuracy: true}}]"


@pytest.fixture
def check(here, monkeypatch, capsys):
    """Run the verb on the small configuration; return the exit code and both outputs."""
    (here / "faulty.py").write_text(FAULTY)
    monkeypatch.setattr(TinyPolicy, "load_network", lambda self: pytest.fail("loaded"))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = command.main(["-c", "base.yaml", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def table_of(output: str) -> dict[tuple[str, str], list[str]]:
    """Return the numbers of each reward and kind."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == 10}


def test_a_good_reward_has_no_flag(check, here):
    before = sorted(here.iterdir())
    code, output, _ = check("--rows", 3)
    assert code == 0
    rows = table_of(output)
    assert rows["exact_answer", "gold"][:7] == ["3", "1", "1", "1", "100%", "100%", "0"]
    assert rows["exact_answer", "wrong: next number"][:7] == ["3", "0", "0", "0", "100%", "0%", "0"]
    assert not any(name == "sum" for name, _ in rows)
    assert "3 rows of Arithmetic, " in output
    assert "tokens are those of TinyPolicy" in output
    assert output.splitlines()[-1] == "no flags"
    assert sorted(here.iterdir()) == before, "nothing is written"


def test_the_sum_of_several_rewards_has_rows_of_its_own(check):
    finished = "{class_path: Finished, init_args: {weight: 0.5}}"
    code, output, _ = check("--rollout.rewards", f"[ExactAnswer, {finished}]", "--rows", 2)
    assert code == 0
    rows = table_of(output)
    assert rows["finished", "gold"][:6] == ["2", "1", "1", "1", "100%", "-"]
    assert rows["sum", "gold"][:6] == ["2", "1.5", "1.5", "1.5", "100%", "100%"]
    assert rows["sum", "truncated"][:3] == ["2", "0", "0"]


def test_flags_end_in_exit_code_1(check):
    code, output, _ = check("--rollout.rewards", ACCURACY % "substring")
    assert code == 1
    lines = output.splitlines()
    assert any(line.startswith("flag  all options, judged right: 12 of 12; ") for line in lines)
    assert re.fullmatch(r"\d+ flags: exit code 1", lines[-1])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hangs", "flag  time-out: reward `hangs` took more than "),
        ("exits", "flag  exception: reward `exits` raised SystemExit: 0 (faulty.py, line 13); "),
    ],
)
def test_a_reward_that_hangs_or_ends_costs_the_answers_of_one_kind(check, name, line):
    code, output, _ = check(
        *("--rollout.rewards", f"['faulty.py:{name}']", "--rows", 1, "--seconds", 2)
    )
    assert code == 1
    (flag,) = [text for text in output.splitlines() if text.startswith(line)]
    kind = {"hangs": "empty", "exits": "null bytes"}[name]
    assert kind in flag
    assert table_of(output)[name, kind][-2] == "1"


def test_a_form_of_the_right_answer(check):
    exact = "[{class_path: ExactAnswer, init_args: {separator: '=> '}}]"
    code, output, _ = check("--rollout.rewards", exact, "--rows", 3)
    assert code == 1
    assert "flag  gold judged wrong: " in output
    code, output, _ = check("--rollout.rewards", exact, "--rows", 3, "--form", "so => {}")
    assert code == 0
    assert "gold is written in the form: given (3 rows)" in output


def test_rows_without_targets_and_rewards_that_abstain(check):
    rows = [{"prompt": f"p{i}", "note": "x"} for i in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("data.yaml").write_text(
        "data: {class_path: PromptFile, init_args: {path: rows.jsonl, chat_template: false}}"
    )
    code, output, _ = check("-c", "data.yaml")
    assert "note  3 rows have no right answer, so no gold" in output
    assert "note  `exact_answer` judged no answer" in output
    assert code == 0


def test_a_configuration_for_a_gpu_is_checked_without_one(check):
    assert check("-c", "hardware/gpu", "--rows", 1)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "`--rows` must be from 1 to 100,000, got 0"),
        (["--seconds", "nan"], "`--seconds` must be positive and finite, got nan"),
        (["--share", "-1"], "`--share` must be at least 0 and finite, got -1"),
        (["--form", "so"], "`--form` 'so' has no {}, which stands for the target"),
        (["--rollout.rewards", "[]"], "`rollout.rewards` is empty"),
        (["--rollout.rewards", "['faulty.py:none']"], "faulty.py has no `none`"),
        (["--rollout.rewards", "[SpanShare]"], "`SpanShare` reads the column `span_length`"),
        (["--rollout.promts", "3"], "no option `rollout.promts`"),
    ],
)
def test_mistakes_are_one_line(check, arguments, message):
    code, _, errors = check(*arguments)
    assert code == 2
    (line,) = [text for text in errors.splitlines() if text.startswith("lightning-mpo: ")]
    assert message in line


def test_it_needs_a_configuration(capsys):
    assert command.main([]) == 2
    assert "`rewards-check` needs a configuration" in capsys.readouterr().err
