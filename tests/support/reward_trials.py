"""Tries rewards on rows of data, as the verb `rewards-check` does."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mpo.rewards import Reward
from lightning_mpo.rewards.answers import KINDS, samples
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.trying import Outcome, Trial, choose_golds, right_forms
from lightning_mpo.types import PromptRow


def words(text: str, finished: bool) -> tuple[int, ...]:
    return tuple(range(len(text.split()) + finished))


def trial(*rewards: Reward, call=judge) -> Trial:
    return Trial(list(rewards), call, words)


def outcomes(rewards: Sequence[Reward], rows: Sequence[PromptRow]) -> list[Outcome]:
    """Return the outcomes of all forms and kinds."""
    tried = trial(*rewards)
    forms = tried.forms(rows)
    names = choose_golds(rows, forms)
    golds = [
        None if name is None else right_forms(row)[name]
        for row, name in zip(rows, names, strict=True)
    ]
    kinds = [tried.outcome(kind, samples(rows, golds)) for kind in KINDS]
    return [*forms.values(), *(outcome for outcome in kinds if outcome is not None)]
