"""Metrics as torchmetrics, and rules over the figures of a run."""

from lightning_mpo.metrics.alarms import WatchdogLimits
from lightning_mpo.metrics.pass_at_k import PassAtK

__all__ = ["PassAtK", "WatchdogLimits"]
