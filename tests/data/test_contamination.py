"""Validation prompts that share a run of words with training rows are found, however they are written."""

from __future__ import annotations

import random
import re

import pytest

from lightning_mpo.data.contamination import runs, shared_runs
from lightning_mpo.types import PromptRow

LONG = "Tom has five red apples and gives two of them to his sister Ann before lunch"
"""Sixteen words."""


def rows(*prompts: str) -> list[PromptRow]:
    return [PromptRow(prompt, "1") for prompt in prompts]


def shared_with(train: list[PromptRow], *prompts: str, **options) -> list[str]:
    return [row.prompt for row, _ in shared_runs(train, rows(*prompts), **options)]


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (LONG, True),
        (LONG.upper().replace(" ", "\n"), True),
        ("Once " + ", ".join(LONG.split()) + "!", True),
        (" ".join(LONG.split()[1:14]) + " dinner", True),  # 13 words
        (" ".join(LONG.split()[1:13]) + " dinner and then", False),  # 12 words
        (LONG.replace("two", "three"), False),
        (" ".join(reversed(LONG.split())), False),
    ],
)
def test_thirteen_words_in_a_row(other, shared):
    assert shared_with(rows("A prompt.", LONG), other) == [other] * shared


@pytest.mark.parametrize(
    ("prompt", "other", "shared"),
    [
        ("What is 2 + 3?", "what is  2 + 3", True),
        ("What is 2 + 3?", "What is 2 * 3?", False),
        ("What is 2 + 3?", "2 + 3", False),
        ("What is 2 + 3?", "What is 2 + 3? Explain.", False),
        ("12+3=", "1+23=", False),
        ("(1+2)*3", "1+(2*3)", False),
    ],
)
def test_shorter_prompts_are_compared_whole(prompt, other, shared):
    assert shared_with(rows("A prompt.", prompt), other) == [other] * shared


def test_a_short_prompt_counts_however_often_it_is_trained_on():
    assert shared_with(rows(*["What is 2 + 3?"] * 30), "What is 2 + 3?") == ["What is 2 + 3?"]


def test_runs_in_many_training_rows_are_common_phrases():
    frame = "{} " + LONG
    for count, expected in ((10, ["other " + LONG]), (11, [])):
        train = rows(*(frame.format(f"word{i}") for i in range(count)))
        assert shared_with(train, "other " + LONG) == expected


def test_solutions_of_training_rows_and_messages_of_chats_are_searched():
    with_solution = PromptRow("A prompt.", "1", solution=f"Recall: {LONG}")
    assert shared_with([with_solution], LONG) == [LONG]
    chat = ({"role": "user", "content": LONG}, {"role": "user", "content": "Why?"})
    assert shared_with(rows(LONG), "Why?") == []
    (pair,) = shared_runs(rows("?", LONG), [PromptRow("Why?", "1", messages=chat)])
    assert pair[1].prompt == LONG


def test_pairs_are_those_of_a_loop_over_all_rows():
    drawn = random.Random(0)
    texts = [" ".join(drawn.choice("abc") for _ in range(drawn.randint(1, 9))) for _ in range(120)]
    train, held_out = rows(*texts[:60]), rows(*texts[60:])

    def parts(text: str) -> set[str]:
        words = re.findall(r"\w", text)
        return {" ".join(words[i : i + 4]) for i in range(max(len(words) - 3, 0))} or {text}

    expected = []
    for row in held_out:
        first = [other for other in train if parts(other.prompt) & parts(row.prompt)]
        expected += [(row, first[0])] if first else []
    assert 10 < len(expected) < 60
    assert shared_runs(train, held_out, size=4, common=1000) == expected


def test_texts_without_words_are_compared_by_their_signs():
    assert runs("+ - ?", 13) == {("+", "-")}
    assert shared_with(rows("++", "--"), "--", "+-") == ["--"]
