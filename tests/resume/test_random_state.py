"""Generators go on where they were, from values that plain loading can bring back."""

from __future__ import annotations

import random

import numpy as np
import torch

from lightning_mpo.resume.random_state import random_state, restore_random_state


def draw() -> list[float]:
    numbers = [
        torch.rand(()).item(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    ]
    return [float(number) for number in numbers]


def test_every_generator_goes_on_where_it_was(tmp_path):
    draw()  # an odd number of normal numbers: the generators keep the second one of a pair
    torch.save(random_state(), tmp_path / "state")
    expected = [draw() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    other = draw()
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draw() for _ in range(3)] == expected
    assert all(one != two for one, two in zip(other, expected[0], strict=True))
