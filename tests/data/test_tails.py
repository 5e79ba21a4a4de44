"""`Tails`: noise from the tail replaces characters of demonstrations, and nothing else changes."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest

from lightning_mpo.characters import MOST, extend_alphabet
from lightning_mpo.data.arithmetic import Arithmetic
from lightning_mpo.data.tails import BASE, Tails
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy


def tails(**options) -> Tails:
    return Tails(**({"train_problems": 500, "held_out_problems": 30} | options))


def clean() -> Arithmetic:
    return Arithmetic(digits=2, train_problems=500, held_out_problems=30)


@pytest.mark.parametrize("vocabulary", [16, 2000, 32_000])
def test_only_characters_of_demonstrations_are_replaced(vocabulary):
    data = tails(tail=0.3, vocabulary=vocabulary)
    alphabet, replaced, total = set(data.alphabet[len(BASE) :]), Counter(), 0
    for row, plain in zip(data.splits.train, clean().splits.train, strict=True):
        assert (row.prompt, row.target) == (plain.prompt, plain.target)
        assert len(row.solution) == len(plain.solution)
        total += len(row.solution)
        for character, intended in zip(row.solution, plain.solution, strict=True):
            if character != intended:
                assert character in alphabet
                replaced[character] += 1
    noise = replaced.total()
    # five standard errors
    assert noise / total == pytest.approx(0.3, abs=5 * (0.21 / total) ** 0.5)
    if vocabulary == 16:
        assert replaced.most_common()[-1][1] / noise == pytest.approx(
            0.5, abs=5 * (0.25 / noise) ** 0.5
        )
    else:
        assert len(replaced) > 0.75 * min(noise, vocabulary - 14)


def test_the_tail_changes_no_careless_habit():
    few, many = (tails(tail=tail, careless_share=0.5).splits.train for tail in (1e-9, 0.5))
    plain = Arithmetic(digits=2, train_problems=500, held_out_problems=30, careless_share=0.5)
    assert few == plain.splits.train
    for row, intended in zip(many, few, strict=True):
        kept = [(a, b) for a, b in zip(row.solution, intended.solution, strict=True) if a in BASE]
        assert kept
        assert all(a == b for a, b in kept)


def test_an_alphabet_is_printable_distinct_and_the_same_for_data_and_policy():
    alphabet = extend_alphabet(BASE, MOST + len(BASE), "Tails")
    assert len(set(alphabet)) == len(alphabet) == MOST + 14
    assert alphabet.startswith(BASE)
    assert {unicodedata.category(c) for c in alphabet[14:]} == {"Lo"}
    assert not any(unicodedata.combining(c) for c in alphabet)
    assert unicodedata.normalize("NFC", alphabet) == alphabet
    assert TinyPolicy(characters=BASE, vocabulary=2000).characters == tails().alphabet
    assert extend_alphabet("乁a", 5, "Tails") == "乁a一丁丂"
    assert extend_alphabet("ab", 2, "Tails") == "ab"


def test_a_large_vocabulary_has_one_token_per_character():
    data, policy = (
        tails(tail=0.5, vocabulary=32_000),
        TinyPolicy(characters=BASE, vocabulary=32_000),
    )
    assert policy.config.vocab_size == 32_002
    data.connect(policy.tokenizer)
    for row in data.splits.train[:30]:
        ids = policy.tokenizer(row.prompt + row.solution)["input_ids"]
        assert len(ids) == len(row.prompt + row.solution)
        assert policy.tokenizer.pad_token_id not in ids
        assert policy.tokenizer.decode(ids) == row.prompt + row.solution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": 0.0}, "`Tails.tail`"),
        ({"tail": 1.0}, "`Tails.tail`"),
        ({"vocabulary": 14}, "`Tails.vocabulary` must be above 14, got 14"),
        ({"vocabulary": 5}, "`Tails.vocabulary` must be above 14, got 5"),
        ({"vocabulary": 50_000}, "`Tails.vocabulary` must be from 14"),
        ({"digits": 1}, "`Tails.digits` = 1 gives 81 problems"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        tails(**options)


def test_a_policy_refuses_a_vocabulary_below_its_characters():
    with pytest.raises(
        UserError, match=r"`TinyPolicy.vocabulary` must be from 14, the number of the characters"
    ):
        TinyPolicy(characters=BASE, vocabulary=13)
