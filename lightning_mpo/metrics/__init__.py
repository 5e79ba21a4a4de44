"""Metrics as torchmetrics, and rules over the figures of a run."""

from lightning_mpo.metrics.alarms import WatchdogLimits
from lightning_mpo.metrics.problems import ProblemResults, paired

__all__ = ["ProblemResults", "WatchdogLimits", "paired"]
