"""Rewards: judgements of completions."""

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.code import CodeAnswer
from lightning_mpo.rewards.countdown import CountdownAnswer
from lightning_mpo.rewards.functions import FunctionReward
from lightning_mpo.rewards.graded import GradedAnswer
from lightning_mpo.rewards.judge import Endpoint, LlmJudge
from lightning_mpo.rewards.math import MathAnswer
from lightning_mpo.rewards.model import RewardModel
from lightning_mpo.rewards.next_line import NextLineLikelihood, Thinks, UsableThought
from lightning_mpo.rewards.peptides import DesignSolved, PeptideClassifier, PeptideDesign
from lightning_mpo.rewards.reasoning_gym import ReasoningGymAnswer
from lightning_mpo.rewards.reference import ReferenceReward
from lightning_mpo.rewards.sandbox import Limits
from lightning_mpo.rewards.scoring import (
    Scores,
    completions_of,
    join_reward_scores,
    score_all,
    take_reward_scores,
)
from lightning_mpo.rewards.shape import (
    Finished,
    LengthCost,
    LengthRange,
    OverlongPenalty,
    RepetitionPenalty,
)
from lightning_mpo.rewards.spans import DrawnDecision, SpanShare
from lightning_mpo.rewards.text import ChoiceAnswer, ExactAnswer, FormatMatch

__all__ = [
    "ChoiceAnswer",
    "CodeAnswer",
    "Completion",
    "CountdownAnswer",
    "DesignSolved",
    "DrawnDecision",
    "Endpoint",
    "ExactAnswer",
    "Finished",
    "FormatMatch",
    "FunctionReward",
    "GradedAnswer",
    "Judgement",
    "LengthCost",
    "LengthRange",
    "Limits",
    "LlmJudge",
    "MathAnswer",
    "NextLineLikelihood",
    "OverlongPenalty",
    "PeptideClassifier",
    "PeptideDesign",
    "ReasoningGymAnswer",
    "ReferenceReward",
    "RepetitionPenalty",
    "Reward",
    "RewardError",
    "RewardModel",
    "Scores",
    "SpanShare",
    "Thinks",
    "TokenReward",
    "UsableThought",
    "completions_of",
    "join_reward_scores",
    "score_all",
    "take_reward_scores",
]
