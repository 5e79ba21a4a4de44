"""Rewards that leave few useful groups, and runs that watch their rollouts."""

from __future__ import annotations

from pathlib import Path

from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.sampling import LocalSampler
from tests.support.runs import Digits, fit


class FewLow(Digits):
    """Right where more than three quarters of the characters are digits below 5: groups of all kinds."""

    is_accuracy = True

    def score(self, completions):
        return [float(share > 0.75) for share in super().score(completions)]


class Always(Digits):
    """Right, whatever was written; the graded part of its score stays."""

    is_accuracy = True

    def score(self, completions):
        return [0.6 + 0.1 * share for share in super().score(completions)]


class Watch(RolloutCallback, LocalSampler):
    """Keeps what was sampled, in its order, and what became of it."""

    def __init__(self) -> None:
        LocalSampler.__init__(self)
        self.drawn, self.events, self.tokens = [], [], 0

    def sample(self, policy, prompts, completions, request, **options):
        state = options["generator"].get_state()
        rollout = super().sample(policy, prompts, completions, request, **options)
        if options.get("progress") is not None:
            self.drawn.append((rollout, state))
        return rollout

    def on_rollout_tokens(self, tokens, running):
        self.tokens += tokens

    def on_rollout_end(self, trainer, module, event):
        self.events.append((event, self.drawn))
        self.drawn = []


def train(
    folder: Path, rewards=None, *, rounds: int | None = 4, callbacks=(), rollout=None, **options
):
    watch = Watch()
    plan = {
        "rewards": rewards or [FewLow()],
        "sampler": watch,
        "dynamic": None if rounds is None else DynamicSampling(rounds),
    }
    return fit(
        folder, rollout=plan | (rollout or {}), callbacks=[watch, *callbacks], **options
    ), watch
