"""Rows of several data in one pool: none twice on both sides, validation rows of the first, mistakes."""

from __future__ import annotations

import pytest

from lightning_mpo.data import Mixed, Multiplication, Scaffolded
from lightning_mpo.errors import UserError

SMALL = {"train_problems": 30, "held_out_problems": 8}


def numbers(digits: int = 3, **options) -> Multiplication:
    return Multiplication(digits=digits, **(SMALL | options))


def prompts(rows) -> list[str]:
    return [row.prompt for row in rows]


def test_rows_of_all_data_are_drawn_and_validation_is_that_of_the_first():
    hard, easy = numbers(), numbers(2)
    mixed = Mixed(hard, [easy], seed=3)
    assert prompts(mixed.splits.train) == prompts([*hard.splits.train, *easy.splits.train])
    assert prompts(mixed.validation_rows) == prompts(hard.validation_rows)
    drawn = [prompt for i in range(6) for prompt in prompts(mixed.training_rows(i, 10))]
    assert sorted(drawn) == sorted(prompts(mixed.splits.train)), "one pass over both"
    assert {len(prompt) for prompt in drawn[:10]} == {5, 6}
    assert mixed.identity()["digest"] != Mixed(hard, [numbers(4)]).identity()["digest"]


def test_validation_prompts_of_the_first_are_left_out_and_counted(capsys, caplog):
    base = numbers()
    other = numbers(held_out_share=0.1)
    # the sides change with the share, so that prompts of one side are on the other
    held_out = Multiplication(
        digits=3, held_out_share=0.9, train_problems=30, held_out_problems=300
    )
    mixed = Mixed(held_out, [base, other])
    with caplog.at_level("INFO"):
        splits = mixed.splits
    both = set(prompts(splits.train)) & set(prompts(splits.validation))
    assert not both
    left_out = 90 - len(splits.train)
    assert left_out > 0
    assert f"{left_out} with a validation prompt of `base` left out" in (
        caplog.text + "".join(capsys.readouterr())
    )


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "`Mixed.others` is empty"),
        ([numbers(suffix="+")], "`suffix` is '' in `base` and '\\+' in `others`; set it alike"),
        ([numbers(max_prompt_tokens=9)], "`max_prompt_tokens` is 512 in `base` and 9"),
        ([Scaffolded(numbers())], "make `Mixed` the `Scaffolded.base`"),
    ],
)
def test_mistakes_end_in_one_line(others, message):
    with pytest.raises(UserError, match=message) as caught:
        Mixed(numbers(), others)
    assert "\n" not in str(caught.value)


def test_scaffolds_are_made_of_mixed_rows():
    rows = Scaffolded(Mixed(numbers(), [numbers(2)]), levels=[0]).splits.train
    assert len(rows) == 60
