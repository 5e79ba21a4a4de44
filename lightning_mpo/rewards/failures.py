"""Completions on which a reward fails: they get a stated value, are counted, and the run goes on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

from lightning_mpo.checks import finite, is_count
from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward


class Failures:
    """Settles the failures of all rewards of a run.

    A first call in which every completion fails is a mistake in the configuration and ends the run.
    So does one that returns another number of values than there are completions.

    Args:
        value: score of a completion on which a reward failed; None: the reward abstains.

    Raises:
        UserError: the value is not a number.
    """

    def __init__(self, value: float | None = None) -> None:
        finite("rollout", failed_reward=value)
        self.value = value
        self.total_failures: dict[int, int] = {}
        """Calls in which every completion failed, by position of a reward that has worked once."""
        self._reported: set[tuple[int, str]] = set()

    def settle(
        self,
        position: int,
        reward: Reward,
        completions: Sequence[Completion],
        judgement: Judgement,
        error: RewardError | None,
    ) -> Judgement:
        """Give failed completions their value, with a warning for each new kind of error.

        Args:
            position: of the reward, in the list of all rewards.
            reward: that judged.
            completions: B responses.
            judgement: its `errors` name the failed completions.
            error: of the call on the whole batch; None: it returned.

        Raises:
            RewardError: every completion failed, or the count of values is wrong, and the reward
                has never worked.
        """
        errors = judgement.errors or [None] * len(completions)
        failed, messages = sum(line is not None for line in errors), list(filter(None, errors))
        first = error or (RewardError(messages[0]) if messages else None)
        if first is None:
            self.total_failures.setdefault(position, 0)
            return judgement
        # a mistake in the configuration
        unknown = position not in self.total_failures
        if unknown and (failed == len(completions) or kind(str(error)) == "must"):
            raise first
        # a later failure of the whole call, or of some completions
        if failed == len(completions):
            self.total_failures[position] += 1
            count = self.total_failures[position]
            self._warn(f"{first}; all {failed} completions failed, in {count} calls so far")
        else:
            self.total_failures.setdefault(position, 0)
            for line in (str(first), *messages):
                if (position, kind(line)) not in self._reported:
                    self._reported.add((position, kind(line)))
                    share = f"{failed} of {len(completions)} completions"
                    self._warn(f"{line}; {share}, judged one by one, failed")
        return self._with_values(reward, completions, judgement, errors)

    def _warn(self, line: str) -> None:
        value = "they are not judged" if self.value is None else f"they get {self.value:g}"
        warnings.warn(
            f"{line}: {value} (`rollout.failed_reward`), and `reward/failed` counts them",
            stacklevel=2,
        )

    def _with_values(
        self,
        reward: Reward,
        completions: Sequence[Completion],
        judgement: Judgement,
        errors: Sequence[str | None],
    ) -> Judgement:
        scores, answered = list(judgement.scores), list(judgement.answered)
        by_token = None if judgement.token_scores is None else list(judgement.token_scores)
        for b, line in enumerate(errors):
            if line is None:
                continue
            scores[b], answered[b] = self.value, False
            if isinstance(reward, TokenReward) and by_token is not None:
                zeros = [0.0] * len(completions[b].token_ids)
                by_token[b] = None if self.value is None else [*zeros[1:], self.value][: len(zeros)]
        return Judgement(scores, answered, by_token, list(errors))

    def load(self, state: Mapping[int, int]) -> None:
        """Take over the counts of a checkpoint.

        Raises:
            TypeError: they are no counts.
        """
        if not all(is_count(number) for entry in state.items() for number in entry):
            raise TypeError("`total_failures` of RolloutLoop must hold counts")
        self.total_failures = dict(state)


def kind(message: str) -> str:
    """Return the part of an error's message that tells its kind.

    Example:
        >>> kind("reward `f` raised ValueError: 7 (f.py, line 3)"), kind("reward `f` returned nan")
        ('raised ValueError', 'returned')
    """
    verb = re.search(r"raised \w+|took|returned|ended|crashed|must", message)
    return verb[0] if verb else ""
