"""The small masked policy: a tokenizer with MASK, and weights that depend on the seed alone."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.policies.tiny import END, PAD
from lightning_mpo.policies.tiny_masked import MASK
from tests.support.builders import CHARACTERS


@pytest.mark.parametrize("text", ["12+34=46;", "1 , 2 ,3", "  7", "9  ", "", CHARACTERS])
def test_text_survives_the_tokenizer(text):
    tokenizer = TinyMaskedPolicy(CHARACTERS).tokenizer
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 2, 0], skip_special_tokens=True) == text


def test_special_tokens_come_first_and_sizes_are_those_given():
    policy = TinyMaskedPolicy(CHARACTERS, hidden_size=32, layers=1, heads=2)
    assert policy.tokenizer.convert_tokens_to_ids([PAD, END, MASK]) == [0, 1, 2]
    assert policy.end_tokens == [1]
    assert policy.mask_id == 2
    assert policy.barred == (0, 2)
    assert policy.vocabulary == len(CHARACTERS) + 3 == len(policy.tokenizer)
    assert policy.positions == 256
    assert policy.masked
    policy.check()
    assert policy.network is None


def test_weights_depend_on_the_seed_alone(tiny_masked):
    one, same, other = (tiny_masked(seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in one.parameters())
    assert one.network.training


def test_it_has_no_dropout(tiny_masked):
    ids, mask = torch.randint(3, 19, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    policy = tiny_masked()
    assert torch.equal(policy.states(ids, mask), policy.states(ids, mask))


def test_characters_beyond_the_first_are_ideographs():
    policy = TinyMaskedPolicy("01", vocabulary=30)
    assert policy.vocabulary == 33
    assert policy.tokenizer.decode([3, 4]) == "01"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"characters": "abca"}, "`TinyMaskedPolicy.characters` must not repeat a character"),
        ({"hidden_size": 30, "heads": 4}, "must be a multiple of `heads` = 4, got 30"),
        ({"layers": 0}, "`TinyMaskedPolicy.layers` must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TinyMaskedPolicy(**options)
