"""The growing cache gives attention what transformers' own cache gives it."""

import pytest
import torch
from transformers import DynamicCache

from lightning_mpo.sampling.cache import ROOM, GrowingLayer, growing_cache


def states(length, rows=2):
    return torch.randn(rows, 3, length, 4), torch.randn(rows, 3, length, 4)


def pair():
    return DynamicCache(), growing_cache()


def step(caches, new):
    """Append to both; return what each hands to attention."""
    return [cache.update(*(part.clone() for part in new), 0) for cache in caches]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("prompt", [1, 5])
def test_equals_the_dynamic_cache_through_repeats_selections_and_growth(prompt):
    torch.manual_seed(0)
    caches = pair()
    assert equal(*step(caches, states(prompt)))
    for cache in caches:
        cache.batch_repeat_interleave(3)
    for t in range(2 * ROOM + 3):
        assert equal(*step(caches, states(1, rows=6 if t < 10 else 2))), t
        if t == 9:
            for cache in caches:
                cache.batch_select_indices(torch.tensor([0, 4]))
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == prompt + 2 * ROOM + 3
    for cache in caches:
        cache.crop(-4)
    assert equal(*step(caches, states(1)))


def test_a_step_writes_in_place():
    layer = GrowingLayer()
    layer.update(*states(3))
    where = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == where
    layer.batch_select_indices(torch.tensor([1]))
    where = layer.keys.data_ptr()
    layer.update(*states(ROOM, rows=1))
    assert layer.keys.data_ptr() != where, "no room was left: a new buffer"


def test_forgets():
    layer = GrowingLayer()
    layer.update(*states(3))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(*states(2))
    assert keys.shape[-2] == 2
