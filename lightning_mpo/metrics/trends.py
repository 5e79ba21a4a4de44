"""Figures of a run in bounded memory: of its first rollouts, of its last ones, and of its best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

DIVERGENCES = ("kl/rollout_mean", "kl/reference")
"""Divergences from the reference; the first one that a run logs counts."""
MEASUREMENTS = 5
"""Divergences that are remembered."""


class Trends:
    """Remembers the figures of rollouts that rules compare.

    Args:
        window: rollouts whose mean is compared with another mean.
        fall: distance of a metric below its best that counts as a fall.

    Example:
        >>> trends = Trends(window=2)
        >>> for reward in (0.1, 0.3, 0.5, 0.7):
        ...     trends.add({"reward/mean": reward})
        >>> trends.ready, trends.start("reward/mean"), trends.now("reward/mean")
        (True, 0.2, 0.6)
    """

    def __init__(self, window: int, fall: float = 0.1) -> None:
        self.window, self.fall = window, fall
        self.first: list[dict[str, float]] = []
        """Figures of the first `window` rollouts."""
        self.last: list[dict[str, float]] = []
        """Figures of the last `2 · window` rollouts."""
        self.best_reward: float | None = None
        """Largest mean of the training reward over `window` rollouts."""
        self.divergences: list[float] = []
        """The last measurements; a value that a later update logs again counts once."""
        self.peaks: dict[str, dict[str, float]] = {}
        """By metric: its best value, the training reward then, the present value, and how many
        values in a row are far below the best while the reward is higher.
        """

    @property
    def ready(self) -> bool:
        """Whether the first and the last rollouts are different ones."""
        return len(self.last) == 2 * self.window

    def add(self, figures: Mapping[str, float], independent: Iterable[str] = ()) -> None:
        """Enter the figures of a rollout, by metric.

        Args:
            figures: logged values. A metric that is not there is not judged.
            independent: metrics among them that training does not optimise.
        """
        entry = dict(figures)
        if len(self.first) < self.window:
            self.first.append(entry)
        self.last = [*self.last, entry][-2 * self.window :]
        # best mean of the training reward
        reward = self.now("reward/mean")
        if reward is not None and len(self.last) >= self.window:
            best = reward if self.best_reward is None else self.best_reward
            self.best_reward = max(reward, best)
        # means of metrics that are compared with it
        for name in independent:
            mean = self.now(name)
            if mean is not None and len(self.last) >= self.window:
                self.compare(name, mean)
        # divergence from the reference
        value = next((figures[name] for name in DIVERGENCES if name in figures), None)
        if value is not None and value not in self.divergences[-1:]:
            self.divergences = [*self.divergences, value][-MEASUREMENTS:]

    def start(self, name: str) -> float | None:
        """Return the mean over the first rollouts; None: not all of them have the metric."""
        return _mean(self.first, name)

    def now(self, name: str) -> float | None:
        """Return the mean over the last rollouts."""
        return _mean(self.last[-self.window :], name)

    def before(self, name: str) -> float | None:
        """Return the mean over as many rollouts before the last ones."""
        return _mean(self.last[: -self.window], name)

    @property
    def spread(self) -> float:
        """Standard deviation of the training reward within a rollout: the larger of first and last
        rollouts.
        """
        return max(self.start("reward/std") or 0.0, self.now("reward/std") or 0.0)

    def compare(self, name: str, value: float) -> None:
        """Enter a value of a metric that training does not optimise.

        Args:
            name: of the metric; it is better when higher.
            value: the present one.
        """
        reward = self.now("reward/mean")
        if reward is None:
            return
        peak = self.peaks.get(name)
        if peak is None or value >= peak["best"]:
            self.peaks[name] = {"best": value, "reward": reward, "value": value, "falls": 0.0}
            return
        apart = value < peak["best"] - self.fall and reward > peak["reward"] + 0.1 * self.spread
        self.peaks[name] = peak | {"value": value, "falls": peak["falls"] + 1 if apart else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs, as plain numbers."""
        return {
            "first": [dict(entry) for entry in self.first],
            "last": [dict(entry) for entry in self.last],
            "best_reward": self.best_reward,
            "divergences": list(self.divergences),
            "peaks": {name: dict(peak) for name, peak in self.peaks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.first, self.last = list(state["first"]), list(state["last"])
        self.best_reward, self.peaks = state["best_reward"], dict(state["peaks"])
        self.divergences = list(state["divergences"])


def _mean(entries: list[dict[str, float]], name: str) -> float | None:
    if not entries or any(name not in entry for entry in entries):
        return None
    return fmean(entry[name] for entry in entries)
