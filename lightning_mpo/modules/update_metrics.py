"""Sums of the metrics of an update over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mpo.scores import Metrics


class UpdateMetrics:
    """Adds (sum, weight) pairs up by name. On each process the names of an update are the same."""

    def __init__(self) -> None:
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a micro-batch, on the CPU."""
        for name, (value, weight) in metrics.items():
            total, weights = self.sums.get(name, (torch.zeros(()), torch.zeros(())))
            self.sums[name] = (total + value.detach().cpu(), weights + weight.detach().cpu())

    def finish(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the values of an update, and begin the next one.

        Losses are sums over the update; all other metrics are means.

        Args:
            over_ranks: sums a tensor over processes; it is called once.
        """
        names = sorted(self.sums)
        sums = over_ranks(torch.stack([torch.stack(self.sums[name]) for name in names]))
        self.sums = {}
        return {
            name: value if name.startswith("loss/") else value / max(weight, 1e-8)
            for name, (value, weight) in zip(names, sums.tolist(), strict=True)
        }
