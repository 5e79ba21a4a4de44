"""The small policy: a tokenizer that round-trips, and weights that depend on the seed alone."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.policies.tiny import END, PAD
from tests.support.builders import CHARACTERS


@pytest.mark.parametrize("text", ["12+34=46;", "1 , 2 ,3", "  7", "9  ", "", "=-=", CHARACTERS])
def test_text_survives_the_tokenizer(text):
    tokenizer = TinyPolicy(CHARACTERS).tokenizer
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == text


def test_other_alphabets_survive_too():
    tokenizer = TinyPolicy("aä\n'. n?").tokenizer
    text = "ä n'a .\n\n?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_and_sizes():
    policy = TinyPolicy(CHARACTERS, hidden_size=32, layers=1, heads=2)
    assert policy.tokenizer.convert_tokens_to_ids([PAD, END]) == [0, 1]
    assert policy.end_tokens == [1]
    assert policy.vocabulary == len(CHARACTERS) + 2 == len(policy.tokenizer)
    policy.check()


def test_nothing_is_loaded_before_build_and_a_second_build_does_nothing(tiny_policy):
    assert TinyPolicy(CHARACTERS).network is None
    with pytest.raises(RuntimeError, match="`build` was not called"):
        TinyPolicy(CHARACTERS).decoder()
    policy = tiny_policy()
    network = policy.network
    policy.build(device=torch.device("cpu"), reference=True)
    assert policy.network is network


def test_weights_depend_on_the_seed_alone(tiny_policy):
    one, same, other = tiny_policy(seed=1), tiny_policy(seed=1), tiny_policy(seed=2)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in one.parameters())
    assert one.network.training


def test_a_repeated_character_is_refused():
    with pytest.raises(
        UserError, match=r"`TinyPolicy.characters` must not repeat a character, got 'abca'"
    ):
        TinyPolicy("abca")


def test_the_width_of_the_first_weights_is_an_option():
    """Of 18 x 64 numbers: five standard errors of a deviation are 0.1 of it, a false alarm in 6e-7 of generators."""
    for width in (0.02, 0.12):
        network = TinyPolicy(hidden_size=64, layers=1, initializer_range=width).load_network()
        assert network.get_input_embeddings().weight[2:].std().item() == pytest.approx(
            width, rel=0.11
        )
