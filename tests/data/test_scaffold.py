"""Scaffolds: strict prefixes by level, nothing of them in the loss, every row counted."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_mpo.data import (
    Delimiters,
    EasyToHard,
    ForgetfulMultiplication,
    Multiplication,
    PromptDataModule,
    Scaffolded,
    Splits,
    WrittenParts,
)
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.types import PromptRow

SMALL = {"digits": 3, "train_problems": 20, "held_out_problems": 5}
ROW = PromptRow("484*3=", "1452", "4*3+0=12,8*3+1=25,4*3+2=14;1452")
FEW = {"train_problems": 200, "held_out_problems": 5}
CHARACTERS = "0123456789*+=,;"


def scaffolded(base: PromptDataModule | None = None, **options: Any) -> Scaffolded:
    options = {"splitter": Delimiters(",;")} | options
    return Scaffolded(base or Multiplication(**SMALL), **options)


def connected(data: PromptDataModule) -> TinyPolicy:
    policy = TinyPolicy(characters=CHARACTERS, hidden_size=16, layers=1, heads=2)
    policy.build(device=torch.device("cpu"), reference=False)
    data.connect(policy.tokenizer, policy.end_tokens)
    return policy


class Written(PromptDataModule):
    """Rows as a test writes them."""

    def __init__(self, train: list[PromptRow], **kwargs: Any) -> None:
        super().__init__(**({"chat_template": False} | kwargs))
        self.train = train

    def load(self) -> Splits:
        return Splits(self.train, [PromptRow("9*9=", "81", "9*9+0=81;81")])


@pytest.mark.parametrize("whole", [False, True])
def test_prompts_are_strict_prefixes_and_the_solution_is_the_rest(whole):
    rows = scaffolded(whole=whole, opening="+").scaffolds(ROW)
    assert [row.extra["level"] for row in rows] == list(range(4 + whole))
    assert rows[0].opening == ""
    for lower, higher in pairwise(rows):
        assert higher.opening.startswith(lower.opening)
        assert len(higher.opening) > len(lower.opening)
    for row in rows:
        assert row.opening.removeprefix("+") + row.solution == ROW.solution
        assert (row.prompt, row.target) == (ROW.prompt, ROW.target)


def test_counts_are_those_of_the_chunks():
    data = scaffolded(whole=True)
    assert len(data.splits.train) == 20 * (1 + 4)
    assert [row.extra for row in data.splits.validation] == [{}] * 5
    assert all(not row.opening for row in data.splits.validation)
    assert data.reported_levels.values == (0, 1, 2, 3, 4)
    assert scaffolded(levels=[0, 2]).reported_levels.values == (0, 2)
    assert (
        scaffolded(levels=[0]).splits.train[0].prompt
        == Multiplication(**SMALL).splits.train[0].prompt
    )


def test_a_seed_gives_an_order_that_mixes_levels():
    def stream(data: Scaffolded) -> list[tuple[str, str]]:
        rows = [row for counter in range(10) for row in data.training_rows(counter, 8)]
        return [(row.prompt, row.opening) for row in rows]

    first = stream(scaffolded())
    assert first == stream(scaffolded())
    assert first != stream(scaffolded(seed=1))
    assert len(set(first)) == 80  # one pass over 20 problems at four levels


def test_tokens_of_a_scaffold_stand_in_the_prompt_and_carry_no_loss():
    data = scaffolded()
    policy = connected(data)
    rows = [row for row in data.splits.train if row.prompt == data.splits.train[0].prompt]
    batch = data.encode(rows)
    decode = policy.tokenizer.decode
    for row, ids, mask in zip(rows, batch.input_ids_PS, batch.attention_mask_PS, strict=True):
        text = decode(ids[mask].tolist(), skip_special_tokens=True).replace(" ", "")
        assert text == row.prompt + row.opening
    rollout = data.solutions(rows)
    for row, ids, mask in zip(rows, rollout.responses_BT, rollout.response_mask_BT, strict=True):
        text = decode(ids[mask].tolist(), skip_special_tokens=True).replace(" ", "")
        assert text == row.solution


def test_long_scaffolds_are_skipped_and_counted(capsys, recwarn):
    data = scaffolded(Multiplication(**SMALL, max_prompt_tokens=20))
    connected(data)
    assert data.reported_levels.values == (0, 1)
    assert "40 of 85 rows are longer than `data.max_prompt_tokens` (20)" in str(recwarn[0].message)
    line = data._line(data._counts(data._loaded.train))
    assert line == "rows by level 0: 20, 1: 20, 2: 0 (20 skipped), 3: 0 (20 skipped)"


def test_solutions_of_few_parts_have_few_levels_and_are_counted():
    rows = [PromptRow("1*1=", "1", "1"), PromptRow("2*3=", "6", "2*3+0=06;6")]
    data = scaffolded(Written(rows))
    assert [(row.prompt, row.extra["level"]) for row in data.splits.train] == [
        ("1*1=", 0),
        ("2*3=", 0),
        ("2*3=", 1),
    ]
    line = data._line(data._counts(data.splits.train))
    few = "2 of 2 solutions have fewer than 4 chunks, 1 of them cannot be cut"
    assert line == f"rows by level 0: 2, 1: 1; {few}"
    # chosen levels, and solutions of one paragraph
    paragraphs = [PromptRow("1*1=", "1", "It is 1."), PromptRow("1*2=", "2", "So.\n\nIt is 2.")]
    data = scaffolded(Written(paragraphs), splitter=WrittenParts(), chunks=2, levels=[1])
    assert [row.prompt for row in data.splits.train] == ["1*2="]
    line = data._line(data._counts(data.splits.train))
    few = "1 of 2 solutions have fewer than 2 chunks, 1 of them cannot be cut"
    assert line == f"rows by level 1: 1; {few}"
    # without scaffolds nothing is lacking
    data = scaffolded(Written(paragraphs), levels=[0])
    assert data._line(data._counts(data.splits.train)) == "rows by level 0: 2"


def test_a_curriculum_may_read_the_level():
    data = scaffolded(curriculum=EasyToHard(rollouts=10))
    assert {row.extra["level"] for row in data.training_rows(0, 8)} == {0}
    assert {row.extra["level"] for row in data.training_rows(10, 60)} == {0, 1, 2, 3}


def test_options_and_rows_of_the_base_count():
    base = Multiplication(**SMALL, suffix="+", validation_prompts=3, max_prompt_tokens=99)
    data = scaffolded(base)
    assert (data.suffix, data.max_prompt_tokens, data.chat_template) == ("+", 99, False)
    assert len(data.validation_rows) == 3
    assert data.identity()["digest"] != scaffolded(levels=[0], base=base).identity()["digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 0}, "`Scaffolded.chunks` must be at least 1"),
        ({"levels": []}, "`Scaffolded.levels` is empty"),
        ({"levels": [4]}, "`Scaffolded.levels` must be"),
        ({"column": ""}, "`Scaffolded.column` must name a column"),
        ({"base": Written([ROW], overlong="cut")}, "`Scaffolded` cannot cut prompts"),
        ({"base": Written([ROW], curriculum=EasyToHard(3))}, "move `base.curriculum` to"),
        ({"base": Written([PromptRow("1*1=", "1")])}, "'1\\*1=' has no solution to cut"),
        ({"base": Written([PromptRow("1=", "1", " ")])}, "'1=' has no solution to cut"),
        ({"base": Written([PromptRow("1=", "1", "1", {"level": 3})])}, "has 'level' already"),
        ({"base": Written([PromptRow("1=", "1", "1", opening="2")])}, "has an opening already"),
        ({"base": Written([PromptRow("1=", "1", "It is 1.")])}, "no solution of 1 has a level"),
        ({"base": Written([ROW]), "chunks": 9, "levels": [0, 8]}, "has a level from 8 on"),
        (
            {"base": Written([ROW]), "chunks": 9, "levels": [4, 8]},
            "level from 4 on, as they have at most 4",
        ),
    ],
)
def test_mistakes_end_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        scaffolded(**options).setup("fit")
    assert "\n" not in str(caught.value)


def test_a_scaffold_that_ends_the_response_is_refused():
    data = scaffolded(Written([ROW]))
    policy = TinyPolicy(characters=CHARACTERS, hidden_size=16, layers=1, heads=2)
    comma = policy.tokenizer.convert_tokens_to_ids(",")
    with pytest.raises(UserError, match="holds a token that ends a response"):
        data.connect(policy.tokenizer, [comma])


def test_steps_forget_their_carries_one_by_one():
    rows = ForgetfulMultiplication(digits=9, careless_share=0.75, **FEW).splits.train
    steps = [step for row in rows for step in row.solution.split(";")[0].split(",")]
    pairs = list(pairwise(steps))
    carries = [(int(a[-2]), int(b[4])) for a, b in pairs if a[-2] != "0" and b[4] in (a[-2], "0")]
    kept = sum(carry == used for carry, used in carries) / len(carries)
    assert 0.2 < kept < 0.3
    assert sum(row.solution.endswith(f";{row.target}") for row in rows) < 10
    careful = ForgetfulMultiplication(digits=9, **FEW).splits.train
    assert all(row.solution.endswith(f";{row.target}") for row in careful)


def test_digits_from_four_on_give_each_step_a_carry():
    data = ForgetfulMultiplication(digits=5, smallest_digit=4, **FEW)
    for row in [*data.splits.train, *data.splits.validation]:
        steps = row.solution.split(";")[0].split(",")
        assert min(map(int, set(row.prompt) - set("*="))) >= 4
        assert [step[4] != "0" for step in steps] == [False, True, True, True, True]
    digits = {digit for row in data.splits.train for digit in row.prompt[:5]}
    assert digits == set("456789")
    # without the option a problem is drawn as in the base class
    draws = [
        owner(digits=5, **FEW).draw(random.Random(1))
        for owner in (ForgetfulMultiplication, Multiplication)
    ]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest_digit": 1}, "`ForgetfulMultiplication.smallest_digit` must be at least 2"),
        ({"smallest_digit": 10}, "`ForgetfulMultiplication.smallest_digit` must be at most 9"),
        (
            {"smallest_digit": 8, "digits": 2},
            "`ForgetfulMultiplication.digits` = 2 gives 8 problems",
        ),
    ],
)
def test_mistakes_of_the_pool_end_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        ForgetfulMultiplication(**(FEW | {"digits": 5} | options))
