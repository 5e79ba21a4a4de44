"""Prompts to train and to validate on."""

from lightning_mpo.data.arithmetic import Arithmetic
from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.data.jsonl import JsonLines
from lightning_mpo.data.svamp import Svamp

__all__ = ["Arithmetic", "JsonLines", "PromptDataModule", "Splits", "Svamp"]
