"""Calls the rewards of a run, those of a user in a helper process, and survives their failures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.failures import Failures
from lightning_mpo.rewards.functions import FunctionReward
from lightning_mpo.rewards.helper import Helper, Spawner
from lightning_mpo.rewards.reference import ReferenceReward


class RewardCaller:
    """Calls rewards: built-in ones in this process, those of a user in a helper process.

    The helper is a fork, so rewards need not be picklable. It is made before a model is loaded, and
    ends with this process, however that ends. After a crash a new one takes its place.

    Args:
        rewards: all rewards of a run.
        seconds: time limit of one call.
        process: run the user's rewards in a helper process.
        failed_reward: score of a completion on which a reward failed; None: the reward abstains.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        seconds: float,
        process: bool,
        failed_reward: float | None = None,
    ) -> None:
        self.rewards, self.seconds = list(rewards), seconds
        self.failures = Failures(failed_reward)
        self.process = process and any(is_of_user(reward) for reward in rewards)
        self._spawner: Spawner | None = None
        self._helper: Helper | None = None
        if self.process:
            self.start()

    def __call__(self, reward: Reward, completions: Sequence[Completion]) -> Judgement:
        """Judge completions by one reward.

        If the call fails, each completion is judged by itself. Those which fail again get the value
        of failed completions.

        Raises:
            RewardError: every completion of the first call of this reward failed: it raised, ended
                its process, took too long, or returned no numbers.
        """
        position = next(i for i, candidate in enumerate(self.rewards) if candidate is reward)
        failure = None
        try:
            judgement = self._judge(position, completions, self.seconds)
        except RewardError as error:
            failure, judgement = error, self._one_by_one(position, completions, error)
        settled = self.failures.settle(position, reward, completions, judgement, failure)
        if settled.errors and all(settled.errors):  # a fresh process, without leaked files
            self.end_helper()
        return settled

    def _judge(self, position: int, completions: Sequence[Completion], seconds: float) -> Judgement:
        reward = self.rewards[position]
        # in this process
        if not self.process or not is_of_user(reward):
            return judge(reward, completions, seconds if is_of_user(reward) else None)
        self.start()
        if self._helper is None:
            return judge(reward, completions, seconds)
        # in the helper, which knows rewards by their position
        try:
            return self._helper.ask(position, reward, completions, seconds)
        finally:
            if self._helper is not None and not self._helper.alive:
                self._helper = None

    def _one_by_one(
        self, position: int, completions: Sequence[Completion], error: RewardError
    ) -> Judgement:
        """Judge each completion by itself, in an equal share of the time."""
        parts = []
        for completion in completions:
            try:
                if len(completions) == 1:
                    raise error
                parts.append(self._judge(position, [completion], self.seconds / len(completions)))
            except RewardError as again:
                parts.append(Judgement([None], [False], [None], [str(again)]))
        is_by_token = isinstance(self.rewards[position], TokenReward)
        return Judgement(
            [score for part in parts for score in part.scores],
            [flag for part in parts for flag in part.answered],
            [row for part in parts for row in part.token_scores or [None]] if is_by_token else None,
            [line for part in parts for line in part.errors or [None]],
        )

    def start(self) -> None:
        """Make the helper, unless this process has one.

        Raises:
            RewardError: the process that forks helpers was ended.
        """
        if self._helper is not None and self._helper.owner == os.getpid():
            return
        if self._spawner is None or self._spawner.owner != os.getpid():
            if torch.cuda.is_initialized():
                warnings.warn(
                    "rewards run in the process of the run, as the GPU is already in use; nothing "
                    "ends one that hangs in C code",
                    stacklevel=2,
                )
                self.process = False
                return
            self._spawner = Spawner(self.rewards)
        try:
            self._helper = Helper(self._spawner)
        except (OSError, EOFError):
            self.close()
            raise RewardError("the process that starts helpers for rewards was ended") from None

    def end_helper(self) -> None:
        """End the helper; the next call starts another one."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def close(self) -> None:
        """End the helper and the process that forks helpers."""
        self.end_helper()
        if self._spawner is not None:
            self._spawner.close()
            self._spawner = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_helper": None, "_spawner": None}


def is_of_user(reward: Reward) -> bool:
    """Return whether a reward is code of the user, or of a package that reads responses."""
    if isinstance(reward, ReferenceReward):  # the policy is in this process
        return False
    known = type(reward).__module__.startswith("lightning_mpo.")
    return isinstance(reward, FunctionReward) or reward.runs_foreign_code or not known
