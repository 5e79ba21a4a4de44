"""Counting bytes of tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mpo.plan.trace import extrapolate, peak_of, without_data


def test_views_and_weights_are_no_new_bytes():
    with torch.device("meta"):
        network = nn.Linear(256, 512, bias=False)
    with without_data(network), torch.no_grad():
        assert (
            peak_of(lambda: network.weight.t().reshape(-1)[:3].sum(), network) <= 4 + 256 * 512 * 4
        )  # reshape copies
        assert peak_of(lambda: network.weight.t(), network) == 0
        assert peak_of(lambda: network(torch.zeros(10, 256)), network) == 10 * (256 + 512) * 4


def test_what_died_is_not_counted_and_gradients_are():
    with torch.device("meta"):
        network = nn.Linear(64, 64, bias=False)

    def work():
        for _ in range(5):
            torch.zeros(1000).add(1)
        network(torch.zeros(1, 64)).sum().backward()

    with without_data(network):
        peak = peak_of(work, network)
        assert 2 * 4000 <= peak < 64 * 64 * 4 + 2 * 4000
        assert peak >= 64 * 64 * 4
        assert network.weight.grad is not None


@pytest.mark.parametrize("layers", [1, 2, 4, 30])
def test_a_layer_costs_what_a_layer_costs(layers):
    assert extrapolate(lambda n: 100 + 7 * n, layers) == 100 + 7 * layers
