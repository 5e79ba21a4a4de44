"""Flags: each fault of a reward has one, and a good reward has none."""

from __future__ import annotations

import re

import pytest

from lightning_mpo.rewards import ExactAnswer, Finished, FunctionReward, OverlongPenalty
from lightning_mpo.rewards.checking import flags
from lightning_mpo.types import PromptRow
from tests.support.reward_trials import outcomes

ROWS = [
    PromptRow(f"{a}+{b}=", str(a + b), f"{a}+{b};{a + b}") for a, b in ((3, 2), (7, 8), (20, 31))
]


def found(*rewards, rows=ROWS, share=0.5) -> dict[str, str]:
    """Return the text of each flag."""
    lines = flags(outcomes(rewards, rows), share)
    assert len({line.fault for line in lines}) == len(lines), "one line for each fault"
    return {line.fault: line.text for line in lines}


@pytest.mark.parametrize(
    "rewards",
    [
        [ExactAnswer()],
        [ExactAnswer(weight=-1.0), ExactAnswer(weight=3.0)],
        [ExactAnswer(), Finished(weight=0.1)],
        [ExactAnswer(), OverlongPenalty(limit=40, buffer=20)],
    ],
    ids=["one", "weights", "finished", "length"],
)
def test_a_good_reward_has_no_flag(rewards):
    assert found(*rewards) == {}


def constant(completions):
    return [0.5] * len(completions)


def test_a_constant():
    assert found(FunctionReward(constant)).keys() == {"constant"}
    assert found(ExactAnswer(), FunctionReward(constant, weight=0.1)).keys() == {"constant"}
    text = found(FunctionReward(constant))["constant"]
    assert re.fullmatch(r"`constant` gives 0.5 to all \d+ answers that it judged", text)


def raises(completions, target):
    return [float(text.split()[0].endswith(t)) for text, t in zip(completions, target, strict=True)]


def test_an_exception_names_the_kinds_of_answers():
    text = found(FunctionReward(raises))["exception"]
    assert text.startswith("reward `raises` raised IndexError: list index out of range (")
    assert text.endswith("; 6 answers of: empty, white space")


def boxed(completions):
    return [float("\\boxed{" in text) for text in completions]


def test_a_format_that_is_paid_without_being_right():
    lines = found(FunctionReward(boxed))
    assert lines["wrong: next number, paid like gold"] == (
        "100% of the reward of gold (1 and 1 on average; empty 0)"
    )
    # little pay beside an accuracy reward is no fault
    assert not any("paid" in fault for fault in found(ExactAnswer(), FunctionReward(boxed, 0.2)))
    lines = found(FunctionReward(boxed, accuracy=True))
    assert lines["LaTeX towers, judged right"].startswith(
        "1 of 1; row 1, target '5': '\\\\boxed{9^{"
    )


def substring(completions, target):
    return [float(t in text) for text, t in zip(completions, target, strict=True)]


def test_a_target_anywhere_in_the_text():
    lines = found(FunctionReward(substring, accuracy=True))
    assert lines["all options, judged right"].startswith("3 of 3; row 1, target '5': '0, 1, 2, ")
    assert {
        "wrong: another row's, judged right",
        "wrong behind thoughts of gold, judged right",
        "thoughts that never end, judged right",
        "a million digits, judged right",
    } <= lines.keys()
    lines = found(FunctionReward(substring))
    assert "all options, paid like gold" in lines


def never(completions):
    return [0.0] * len(completions)


def test_a_right_answer_that_is_judged_wrong_is_shown():
    rows = [*ROWS, PromptRow("1+1=", "2", "one and one;2 ")]

    def strict(completions, target):
        return [
            float(text.partition(";")[2] == t) for text, t in zip(completions, target, strict=True)
        ]

    lines = found(FunctionReward(strict, accuracy=True), rows=rows)
    assert lines["form: solution judged wrong"] == "1 of 4; row 4, target '2': 'one and one;2 '"
    assert "gold judged wrong" not in lines
    lines = found(FunctionReward(never, accuracy=True))
    assert lines.keys() == {"constant", "gold judged wrong"}
    lines = found(ExactAnswer("=> "), Finished())
    assert lines["gold judged wrong"] == "3 of 3; row 1, target '5': '3+2;5'"


def abstains(completions):
    return [None] * len(completions)


def test_a_right_answer_that_is_not_judged():
    text = found(FunctionReward(abstains))["gold not judged"]
    assert text == "3 of 3; row 1, target '5': '3+2;5'"


def counts(completions, target):
    return [text.count(t) / 8 for text, t in zip(completions, target, strict=True)]


def test_more_reward_for_an_answer_that_is_repeated():
    lines = found(FunctionReward(counts))
    assert lines["gold twice, above gold"] == "0.25 on average, and gold 0.125"
    assert "gold 50 times, above gold" in lines


def short(completions):
    return [-float(len(text)) for text in completions]


def test_an_empty_answer_that_is_worth_as_much_as_a_right_one():
    lines = found(FunctionReward(short))
    assert lines["empty, above gold"].startswith("0 on average, and gold -")
    lines = found(FunctionReward(lambda completions: [float("\a" in c) for c in completions]))
    assert lines["gold, no better than empty"] == "0 on average, and an empty answer 0"


def test_the_share_that_answers_may_have():
    def lenient(completions, target):
        return [
            0.4 + 0.6 * text.endswith(f";{t}") if ";" in text and "<" not in text else 0.0
            for text, t in zip(completions, target, strict=True)
        ]

    assert found(FunctionReward(lenient)) == {}
    assert "wrong: next number, paid like gold" in found(FunctionReward(lenient), share=0.3)
