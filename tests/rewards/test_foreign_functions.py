"""Functions with the signatures of TRL and verl run as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, RewardError
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.functions import FunctionReward

ROWS = [
    Completion(
        "What is 6 times 7?",
        f"<think>easy</think><answer>{answer}</answer> #### {answer}",
        "42",
        9,
        True,
        {"data_source": "openai/gsm8k", "level": 3},
        token_ids=tuple(range(9)),
    )
    for answer in ("42", "41")
]


# --- TRL: lists by name, all columns, the ids of completions


def form_of_thoughts(completions, **kwargs):
    """Reward the tags of thoughts and answers."""
    form = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    return [1.0 if form.match(text) else 0.0 for text in completions]


def short_ones(completion_ids, **kwargs):
    return [20 - float(len(ids)) for ids in completion_ids]


def ground_truth_in_a_box(prompts, completions, target, level, log_metric=None, **kwargs):
    assert prompts[0].startswith("What is")
    return [
        float(t in c) if n == 3 else None
        for c, t, n in zip(completions, target, level, strict=True)
    ]


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (form_of_thoughts, [1.0, 1.0]),
        (short_ones, [11.0, 11.0]),
        (ground_truth_in_a_box, [1.0, 0.0]),
    ],
)
def test_functions_of_trl(function, scores) -> None:
    assert judge(FunctionReward(function), ROWS).scores == scores


def tags_of_messages(prompts, completions, **kwargs):
    """Read the responses of chats."""
    assert [prompt[-1]["role"] for prompt in prompts] == ["user", "user"]
    texts = [completion[0]["content"] for completion in completions]
    return [float("<answer>42</answer>" in text) for text in texts]


def test_functions_of_trl_for_chats() -> None:
    reward = FunctionReward(tags_of_messages, messages=True)
    assert judge(reward, ROWS).scores == [1.0, 0.0]
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 * 6?"})
    rows = [replace(row, messages=chat) for row in ROWS]
    assert judge(reward, rows).scores == [1.0, 0.0]
    assert [message["role"] for message in rows[0].chat] == ["system", "user"]


def test_a_function_for_chats_that_gets_texts() -> None:
    with pytest.raises(RewardError, match=r"string indices .*; completions are texts; `messages: "):
        judge(FunctionReward(tags_without_prompts), ROWS)


def tags_without_prompts(completions, **kwargs):
    return [float(completion[0]["content"] == "") for completion in completions]


# --- verl: one response at a time


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Compare the number behind the hashes, as scores of GSM8K do."""
    if data_source != "openai/gsm8k":
        raise NotImplementedError(data_source)
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str)
    return 1.0 if found and found[-1] == ground_truth else 0.0


def without_source(solution_str, ground_truth, **kwargs):
    return {"score": float(ground_truth in solution_str), "acc": True}


def looks_into_the_row(data_source, solution_str, ground_truth, extra_info, factor=0.5):
    return factor * extra_info["level"]


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (compute_score, [1.0, 0.0]),
        (without_source, [1.0, 0.0]),
        (looks_into_the_row, [1.5, 1.5]),
    ],
)
def test_functions_of_verl(function, scores) -> None:
    reward = FunctionReward(function)
    reward.check_columns(["level"])
    assert judge(reward, ROWS).scores == scores


def test_a_function_of_one_response_with_an_unknown_argument() -> None:
    def f(solution_str, reference):
        return 0.0

    with pytest.raises(RewardError, match="reward `f` takes `reference`, which it is not given"):
        FunctionReward(f).check_columns(["level"])


def test_a_function_of_one_response_takes_no_messages() -> None:
    with pytest.raises(UserError, match="`compute_score` takes `solution_str`, which is one text"):
        FunctionReward(compute_score, messages=True)
