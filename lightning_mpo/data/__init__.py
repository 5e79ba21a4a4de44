"""Prompts to train and to validate on."""

from lightning_mpo.data.arithmetic import Arithmetic, ForgetfulMultiplication, Multiplication
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.chunking import Delimiters, Splitter, WrittenParts
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.data.code_windows import CodeWindows
from lightning_mpo.data.commented_lines import CommentedLines
from lightning_mpo.data.competitions import Aime, Amc, Math500, MathProblems
from lightning_mpo.data.countdown import Countdown
from lightning_mpo.data.curriculum import Curriculum, EasyToHard, Stages, SuccessRate
from lightning_mpo.data.generated import GeneratedProblems
from lightning_mpo.data.gsm8k import Gsm8k
from lightning_mpo.data.jsonl import JsonLines
from lightning_mpo.data.mixed import Mixed
from lightning_mpo.data.peptides import Peptides
from lightning_mpo.data.programming import HumanEval, Mbpp
from lightning_mpo.data.prompts import PromptFile
from lightning_mpo.data.reasoning_gym import ReasoningGym
from lightning_mpo.data.scaffold import Scaffolded
from lightning_mpo.data.spans import Spans
from lightning_mpo.data.stars import StarGraphs
from lightning_mpo.data.svamp import Svamp
from lightning_mpo.data.table import PublicTable, Table
from lightning_mpo.data.tails import Tails
from lightning_mpo.types import Splits

__all__ = [
    "Aime",
    "Amc",
    "Arithmetic",
    "CodeLines",
    "CodeWindows",
    "CommentedLines",
    "Countdown",
    "Curriculum",
    "Delimiters",
    "EasyToHard",
    "ForgetfulMultiplication",
    "GeneratedProblems",
    "Gsm8k",
    "HumanEval",
    "JsonLines",
    "Math500",
    "MathProblems",
    "Mbpp",
    "Mixed",
    "Multiplication",
    "Peptides",
    "PromptDataModule",
    "PromptFile",
    "PublicTable",
    "ReasoningGym",
    "Scaffolded",
    "Spans",
    "Splits",
    "Splitter",
    "Stages",
    "StarGraphs",
    "SuccessRate",
    "Svamp",
    "Table",
    "Tails",
    "WrittenParts",
]
