"""From judgements of single rewards to the scores of a rollout.

Training, validation and prediction share one definition of judged, right and answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.process import is_of_user
from lightning_mpo.rewards.thoughts import ends_in_thoughts
from lightning_mpo.types import Finish, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch; the docstring of `rewards/base.py` defines the words."""

    rewards_B: Tensor  # float64, the weighted sum over the rewards that judged
    valid_B: Tensor  # bool: judged, and not excluded by dynamic sampling
    correct_B: Tensor  # bool
    answered_B: Tensor  # bool
    by_reward: Mapping[str, Tensor]  # float64 by reward name, unweighted, nan if not judged
    decided_B: Tensor  # bool
    # float64, rewards of tokens: the weighted sum over all `TokenReward`, contained in `rewards_B`.
    # Column t is the t-th token of the completion, 0 behind the last. None: no `TokenReward`
    token_rewards_BC: Tensor | None = None
    weights: Mapping[str, float] = field(default_factory=dict)  # by reward name
    failed_B: Tensor | None = None  # bool: at least one reward failed; None: none did

    @property
    def failures_B(self) -> Tensor:
        """Rows on which at least one reward failed, shape `[B]`."""
        return torch.zeros_like(self.decided_B) if self.failed_B is None else self.failed_B

    @property
    def judged_B(self) -> Tensor:
        """Rows that at least one reward judged, shape `[B]`."""
        if not self.by_reward:
            return self.valid_B
        return ~torch.stack([scores_B.isnan() for scores_B in self.by_reward.values()]).all(0)


def take_reward_scores(scores: Scores, index_B: Tensor) -> Scores:
    """Return the scores of selected rows, in the order of `index_B`."""
    return Scores(
        rewards_B=scores.rewards_B[index_B],
        valid_B=scores.valid_B[index_B],
        correct_B=scores.correct_B[index_B],
        answered_B=scores.answered_B[index_B],
        by_reward={name: values_B[index_B] for name, values_B in scores.by_reward.items()},
        decided_B=scores.decided_B[index_B],
        token_rewards_BC=None
        if scores.token_rewards_BC is None
        else scores.token_rewards_BC[index_B],
        weights=scores.weights,
        failed_B=None if scores.failed_B is None else scores.failed_B[index_B],
    )


def join_reward_scores(batches: Sequence[Scores]) -> Scores:
    """Join the scores of several batches, row after row.

    Raises:
        ValueError: the batches have different rewards.
    """
    names = list(batches[0].by_reward)
    if any(list(batch.by_reward) != names for batch in batches):
        raise ValueError(
            "`batches` must be scores of the same rewards, got "
            f"{[list(batch.by_reward) for batch in batches]}"
        )
    by_token = [batch.token_rewards_BC for batch in batches if batch.token_rewards_BC is not None]
    if len(by_token) not in (0, len(batches)):
        raise ValueError(
            f"`batches` must be scores of the same rewards: {len(by_token)} of {len(batches)} "
            "have rewards of tokens"
        )
    return Scores(
        rewards_B=torch.cat([batch.rewards_B for batch in batches]),
        valid_B=torch.cat([batch.valid_B for batch in batches]),
        correct_B=torch.cat([batch.correct_B for batch in batches]),
        answered_B=torch.cat([batch.answered_B for batch in batches]),
        by_reward={name: torch.cat([batch.by_reward[name] for batch in batches]) for name in names},
        decided_B=torch.cat([batch.decided_B for batch in batches]),
        token_rewards_BC=_stack_rows(by_token) if by_token else None,
        weights=batches[0].weights,
        failed_B=torch.cat([batch.failures_B for batch in batches]),
    )


def _stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """Join tensors `[B, C]` of different widths, with 0 in missing columns."""
    C = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, C - part.shape[1])) for part in parts])


def completions_of(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Completion]:
    """Describe each row of a rollout to rewards.

    Args:
        rollout: responses with their texts and rows.
        tokenizer: decodes the rendered prompts, to see which of them opened thoughts; None: none
            did.
    """
    mask_BT, responses_BT = rollout.response_mask_BT.cpu(), rollout.responses_BT.cpu()
    ids = [tuple(row[mask].tolist()) for row, mask in zip(responses_BT, mask_BT, strict=True)]
    finish, thinking = rollout.finish_B.tolist(), _thinking(rollout, tokenizer)
    return [
        Completion(
            row.prompt,
            text,
            row.target,
            len(tokens),
            end == Finish.STOP,
            row.extra,
            opened,
            tokens,
            row.solution,
            row.messages,
        )
        for row, text, tokens, end, opened in zip(
            rollout.rows, rollout.texts, ids, finish, thinking, strict=True
        )
    ]


def _thinking(rollout: Rollout, tokenizer: PreTrainedTokenizerBase | None) -> list[bool]:
    """Return for each row whether its rendered prompt ends inside thoughts.

    The prompt of a group is decoded once.
    """
    groups = rollout.group_B.tolist()
    if tokenizer is None:
        return [False] * len(groups)
    S, known = rollout.prompt_length, dict[int, bool]()
    for b, group in enumerate(groups):
        if group not in known:
            prompt_S = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
            known[group] = ends_in_thoughts(
                str(tokenizer.decode(prompt_S.tolist(), skip_special_tokens=False))
            )
    return [known[group] for group in groups]


def score_all(
    rewards: Sequence[Reward],
    completions: Sequence[Completion],
    call: Callable[[Reward, Sequence[Completion]], Judgement] = judge,
) -> Scores:
    """Call every reward and add the weighted scores up.

    Args:
        rewards: all rewards of the run.
        completions: B responses.
        call: calls one reward; by default in this process, without a time limit.

    Returns:
        Rewards and judgements per row.

    Raises:
        RewardError: a reward raised, or returned a wrong count or a value that is not a finite
            number; a weight is not finite; float32 cannot hold a sum.
    """
    # start from rows that nothing has judged
    B = len(completions)
    total = torch.zeros(B, dtype=torch.float64)
    valid, decided, failed = torch.zeros(3, B, dtype=torch.bool).unbind()
    correct, answered = torch.ones_like(valid), torch.ones_like(valid)
    by_reward: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    token_rewards_BC = _no_token_rewards(
        rewards, (B, max((len(completion.token_ids) for completion in completions), default=0))
    )
    # add one reward after the other; nan stands for "not judged"
    for reward in rewards:
        weight, judgement = _weight(reward), call(reward, completions)
        scores = [math.nan if score is None else score for score in judgement.scores]
        scores_B = torch.tensor(scores, dtype=torch.float64)
        judged_B = ~scores_B.isnan()
        valid |= judged_B
        total += weight * scores_B.nan_to_num()
        for b, values in enumerate(judgement.token_scores or ()):
            if values and token_rewards_BC is not None:
                values_T = torch.tensor(values, dtype=torch.float64)
                token_rewards_BC[b, : len(values)] += weight * values_T
        if reward.is_accuracy:
            decided |= judged_B
            correct &= ~judged_B | (scores_B > 0.5)
        answered &= ~judged_B | torch.tensor(judgement.answered, dtype=torch.bool)
        errors = judgement.errors or [None] * B
        failed |= torch.tensor([line is not None for line in errors], dtype=torch.bool)
        name = _free_name(reward.name, by_reward)
        by_reward[name], weights[name] = scores_B, weight
    _check_total(total, rewards)
    if token_rewards_BC is not None:  # advantages hold sums over some of the tokens
        _check_total(token_rewards_BC.abs().sum(1), rewards, "absolute rewards of the tokens")
    correct, answered = correct & decided, answered & valid
    return Scores(
        total, valid, correct, answered, by_reward, decided, token_rewards_BC, weights, failed
    )


def answers_of(
    rewards: Sequence[Reward], completions: Sequence[Completion]
) -> Sequence[str | None] | None:
    """Return the answer of each completion as text, for the vote of a majority.

    None: there is not exactly one accuracy reward, it reads no answers, or it is code of the user,
    which is called for scores alone.
    """
    judges = [reward for reward in rewards if reward.is_accuracy]
    if len(judges) != 1 or is_of_user(judges[0]):
        return None
    return judges[0].answers(completions)


def unjudged(rewards: Sequence[Reward], count: int) -> Scores:
    """Return the scores of rows that no reward judged, in place of those of a failed reward."""
    none_B = torch.zeros(count, dtype=torch.bool)
    by_reward: dict[str, Tensor] = {}
    for reward in rewards:
        scores_B = torch.full((count,), math.nan, dtype=torch.float64)
        by_reward[_free_name(reward.name, by_reward)] = scores_B
    total_B = torch.zeros(count, dtype=torch.float64)
    token_rewards_BC = _no_token_rewards(rewards, (count, 0))
    return Scores(total_B, none_B, none_B, none_B, by_reward, none_B, token_rewards_BC)


def _no_token_rewards(rewards: Sequence[Reward], shape: tuple[int, int]) -> Tensor | None:
    """Return zeros for rewards of tokens; None: no reward is a `TokenReward`."""
    by_token = any(isinstance(reward, TokenReward) for reward in rewards)
    return torch.zeros(shape, dtype=torch.float64) if by_token else None


def _weight(reward: Reward) -> float:
    """Return the weight of a reward, which may have changed since its construction."""
    weight = getattr(reward, "weight", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise RewardError(
            f"the weight of reward `{reward.title}` must be a finite number, got {weight!r:.40}"
        )
    return float(weight)


def _check_total(total_B: Tensor, rewards: Sequence[Reward], terms: str = "rewards") -> None:
    """Refuse sums that float32 cannot hold, as advantages are float32."""
    bad = (~total_B.float().isfinite()).nonzero()
    if len(bad):
        weights = ", ".join(f"{reward.title} {reward.weight:g}" for reward in rewards)
        raise RewardError(
            f"the weighted sum of the {terms} of completion {int(bad[0])} is "
            f"{total_B[bad[0]].item():.3g}, more than float32 holds; lower the weights ({weights})"
        )


def _free_name(name: str, taken: Mapping[str, Tensor]) -> str:
    """Return the name, or with a number if another reward has it."""
    return next(
        free
        for free in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 2)))
        if free not in taken
    )
