"""Rewards: judgements of completions."""

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.countdown import CountdownAnswer
from lightning_mpo.rewards.functions import FunctionReward
from lightning_mpo.rewards.math import MathAnswer
from lightning_mpo.rewards.scoring import (
    Scores,
    completions_of,
    join_reward_scores,
    score_all,
    take_reward_scores,
)
from lightning_mpo.rewards.shape import Finished, OverlongPenalty
from lightning_mpo.rewards.spans import DrawnDecision, SpanShare
from lightning_mpo.rewards.text import ExactAnswer

__all__ = [
    "Completion",
    "CountdownAnswer",
    "DrawnDecision",
    "ExactAnswer",
    "Finished",
    "FunctionReward",
    "Judgement",
    "MathAnswer",
    "OverlongPenalty",
    "Reward",
    "RewardError",
    "Scores",
    "SpanShare",
    "TokenReward",
    "completions_of",
    "join_reward_scores",
    "score_all",
    "take_reward_scores",
]
