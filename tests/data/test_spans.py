"""`Spans`: a naive loop computes each decision of a target."""

from __future__ import annotations

import pytest

from lightning_mpo.data.spans import Spans
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy


def spans(**options) -> Spans:
    return Spans(**({"train_problems": 200, "held_out_problems": 20} | options))


def decisions_of(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def symbols_of(prompt: str, length: int) -> list[int]:
    """Return the numbers of the symbols, each of which the prompt repeats."""
    runs = decisions_of(prompt.removesuffix("="), length)
    assert all(run == run[0] * length for run in runs)
    return ["abcdefgh".index(run[0]) for run in runs]


@pytest.mark.parametrize(("decisions", "length"), [(24, 3), (72, 1), (20, 4)])
def test_each_decision_is_the_sum_of_two_symbols(decisions, length):
    data = spans(decisions=decisions, length=length)
    for row in data.splits.train[:50]:
        symbols = symbols_of(row.prompt, length)
        assert len(symbols) == decisions
        for i, word in enumerate(decisions_of(row.target, length)):
            total = symbols[i] + (symbols[i - 1] if i else 0)
            number = total - 8 if total >= 8 else total
            assert word[0] == "abcdefgh"[number]
            assert word == data.spell(number)
        assert len(row.solution) == len(row.target) == decisions * length
        assert row.extra == {"span_length": length}


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_first_character_fixes_the_rest(length):
    words = [spans(length=length).spell(entity) for entity in range(8)]
    assert {len(word) for word in words} == {length}
    assert len(set("".join(words))) == 8 * length


@pytest.mark.parametrize("careless_share", [0.0, 0.6, 1.0])
def test_careless_decisions_drop_the_sum(careless_share):
    data, careless, chances = spans(careless_share=careless_share), 0, 0
    for row in data.splits.train:
        symbols = symbols_of(row.prompt, 3)
        for i, (shown, right) in enumerate(
            zip(decisions_of(row.solution, 3), decisions_of(row.target, 3), strict=True)
        ):
            alone = data.spell(symbols[i])
            assert shown in (alone, right)
            if alone != right:
                chances += 1
                careless += shown == alone
    # five standard errors
    share = careless_share
    assert careless / chances == pytest.approx(
        share, abs=5 * (share * (1 - share) / chances) ** 0.5
    )


def test_the_policy_of_the_recipe_writes_it():
    policy = TinyPolicy(characters="abcdefghijklmnopqrstuvwxyz=")
    for row in spans().splits.train[:20]:
        ids = policy.tokenizer(row.prompt + row.solution)["input_ids"]
        assert policy.tokenizer.pad_token_id not in ids
        assert policy.tokenizer.decode(ids) == row.prompt + row.solution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "`Spans.length` must be at least 1, got 0"),
        ({"length": 8}, "`Spans.length` = 8 needs 64 characters for `entities` = 8, over the 62"),
        ({"entities": 1}, "`Spans.entities` must be at least 2, got 1"),
        ({"decisions": 0}, "`Spans.decisions` must be at least 1, got 0"),
        (
            {"decisions": 3},
            "`Spans.decisions` = 3 gives 512 problems, and `held_out_share` = 0.1 leaves 461",
        ),
        ({"careless_share": -0.1}, "careless_share"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        spans(**({"train_problems": 300} | options))


def test_responses_must_hold_all_decisions():
    spans().check_response(73)
    with pytest.raises(UserError, match=r"needs responses of 73 tokens with the end token, over"):
        spans().check_response(72)
