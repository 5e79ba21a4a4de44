"""Prompts to train and to validate on."""

from lightning_mpo.data.arithmetic import Arithmetic, Multiplication
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.jsonl import JsonLines
from lightning_mpo.data.prompts import PromptFile
from lightning_mpo.data.svamp import Svamp
from lightning_mpo.types import Splits

__all__ = [
    "Arithmetic",
    "JsonLines",
    "Multiplication",
    "PromptDataModule",
    "PromptFile",
    "Splits",
    "Svamp",
]
