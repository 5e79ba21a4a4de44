"""Rewards: judgements of completions."""

from lightning_mpo.rewards.base import Completion, Reward, RewardError, Scores, completions_of, score_all
from lightning_mpo.rewards.math import MathAnswer
from lightning_mpo.rewards.shape import Finished
from lightning_mpo.rewards.text import ExactAnswer

__all__ = [
    "Completion",
    "ExactAnswer",
    "Finished",
    "MathAnswer",
    "Reward",
    "RewardError",
    "Scores",
    "completions_of",
    "score_all",
]
