"""Metrics, as torchmetrics."""

from lightning_mpo.metrics.pass_at_k import PassAtK

__all__ = ["PassAtK"]
