"""Numbers that options of rewards take, and other arguments that rewards need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_mpo.rewards import Endpoint

WEIGHED = [
    "ChoiceAnswer",
    "ExactAnswer",
    "Finished",
    "FormatMatch",
    "FunctionReward",
    "LengthCost",
    "LengthRange",
    "LlmJudge",
    "MathAnswer",
    "NextLineLikelihood",
    "OverlongPenalty",
    "PeptideClassifier",
    "PeptideDesign",
    "RepetitionPenalty",
    "RewardModel",
]
"""Rewards whose weight may have either sign."""
ALLOWED: dict[str, dict[str, str]] = {
    "Endpoint.pause": {"0": "no pause"},
    "Endpoint.retries": {"0": "one try"},
    "LengthRange.longest": {"0": "an empty response"},
    "LengthRange.shortest": {"0": "no shortest length"},
    "LlmJudge.low": {"-1": "a lower scale", "0": "a scale from 0"},
    "NextLineLikelihood.cost": {"0": "thoughts are free"},
    "NextLineLikelihood.penalty": {"0": "costs what a thought costs"},
    "PeptideClassifier.held_out_share": {"0": "no context is held out"},
    "Range.high": {"-1": "a negative property", "0": "at most 0"},
    "Range.low": {"-1": "a negative property", "0": "at least 0"},
    "RewardModel.label": {"0": "the first output"},
    "RolloutLoop.failed_reward": {"-1": "a penalty", "0": "counts as wrong"},
} | {f"{name}.weight": {"-1": "a penalty", "0": "measured only"} for name in WEIGHED}
"""Values that an option takes although they were tried, and why."""
REQUIRED: dict[str, Callable[[], dict[str, Any]]] = {
    "Endpoint": lambda: {"url": "http://localhost", "model": "judge"},
    "FormatMatch": lambda: {"pattern": "x"},
    "FunctionReward": lambda: {"function": len},
    "LengthCost": lambda: {"per_token": 0.1},
    "LengthRange": lambda: {"shortest": 0, "longest": 8},
    "LlmJudge": lambda: {"endpoint": Endpoint("http://localhost", "judge")},
    "OverlongPenalty": lambda: {"limit": 8, "buffer": 2},
    "RewardModel": lambda: {"source": "folder"},
}
"""What classes need besides the option under test."""
