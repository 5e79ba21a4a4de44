"""Rules over the figures of a run. Each returns one sentence: figure, likely cause and option."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_mpo.checks import above, at_least, positive, within
from lightning_mpo.metrics.trends import Trends

SOLVED = 0.9
"""Accuracy from which on a policy need not explore: it has solved its data."""


@dataclass(frozen=True)
class WatchdogLimits:
    """Limits of the rules; None switches a rule off. docs/watchdog.md says where they are from.

    Args:
        window: rollouts whose mean is compared with that of the first `window` rollouts.
        entropy_share: entropy, relative to the start, below which the policy has collapsed.
        entropy_growth: entropy, relative to the start, above which the policy is random.
        length_share: length of responses, relative to the start, below which they have collapsed.
        truncated_share: share of responses cut off that is too many, if it has risen by half of it.
        answered_share: share of answers that a reward could read, relative to the start.
        repetition: share of repeated four-token sequences that is too many, if it has risen by 0.2.
        kl_jump: rise of the divergence from the reference (nats per token) between measurements.
        reward_fall: distance of the training reward from its best, in standard deviations.
        hacking: fall of an independent metric while the training reward rises.
        flat_share: share of prompts without a gradient that is too many, if most answers are wrong.
        could_not_stop: share of responses cut off whose supports never held an end token.
    """

    window: int = 3
    entropy_share: float | None = 0.1
    entropy_growth: float | None = 3.0
    length_share: float | None = 0.5
    truncated_share: float | None = 0.5
    answered_share: float | None = 0.5
    repetition: float | None = 0.5
    kl_jump: float | None = 0.3
    reward_fall: float | None = 1.0
    hacking: float | None = 0.1
    flat_share: float | None = 0.9
    could_not_stop: float | None = 0.5

    def __post_init__(self) -> None:
        at_least("Watchdog.limits", 1, most=10_000, window=self.window)
        positive(
            "Watchdog.limits",
            kl_jump=self.kl_jump,
            reward_fall=self.reward_fall,
            hacking=self.hacking,
        )
        above("Watchdog.limits", 1, entropy_growth=self.entropy_growth)
        within(
            "Watchdog.limits",
            "(0, 1)",
            entropy_share=self.entropy_share,
            length_share=self.length_share,
            truncated_share=self.truncated_share,
            answered_share=self.answered_share,
            repetition=self.repetition,
            flat_share=self.flat_share,
            could_not_stop=self.could_not_stop,
        )


def alarms(trends: Trends, limits: WatchdogLimits) -> dict[str, str]:
    """Return the sentence of each cause that holds, by cause.

    Args:
        trends: figures of the run.
        limits: of the rules.
    """
    sentences = dict(_evaluated(trends, limits))
    if trends.ready:
        for rules in (_entropy, _responses, _reward):
            sentences |= dict(rules(trends, limits))
    return sentences


def _entropy(trends: Trends, limits: WatchdogLimits) -> Iterator[tuple[str, str]]:
    start, now = trends.start("policy/entropy"), trends.now("policy/entropy")
    flat, accuracy = trends.now("rollout/groups_flat"), trends.now("reward/accuracy")
    if not start or now is None:
        return
    # too low, while there is more to learn
    solved = accuracy is not None and accuracy >= SOLVED
    if _under(now, start, limits.entropy_share) and not solved and not _rises(trends):
        yield (
            "entropy_low",
            f"the entropy of the policy fell from {start:.3g} to {now:.3g} nats a token and the "
            f"reward no longer rises ({flat or 0.0:.0%} of prompts have completions of one "
            "reward): the policy has stopped exploring; add `EntropyBonus` to `objective.terms`, "
            "raise `objective.surrogate.high`, or lower the learning rate",
        )
    # too high, while the reward falls
    if limits.entropy_growth and now > limits.entropy_growth * start and _fell(trends):
        yield (
            "entropy_high",
            f"the entropy of the policy rose from {start:.3g} to {now:.3g} nats a token, and the "
            f"reward is below its start ({_reward_now(trends)}): updates make the policy random; "
            "lower the learning rate, set `trainer.gradient_clip_val`, or add `KLPenalty` to "
            "`objective.terms`",
        )


def _responses(trends: Trends, limits: WatchdogLimits) -> Iterator[tuple[str, str]]:
    # length
    start, now = trends.start("rollout/length"), trends.now("rollout/length")
    if start and now is not None and _under(now, start, limits.length_share) and _fell(trends, 0):
        yield (
            "length_low",
            f"responses shrank from {start:.3g} to {now:.3g} tokens, and the reward did not rise "
            f"({_reward_now(trends)}): the policy ends before it answers; look into `completions/`,"
            " give a reward for whole answers in `rollout.rewards`, or lower the learning rate",
        )
    start, now = trends.start("rollout/truncated"), trends.now("rollout/truncated")
    if _risen(start, now, limits.truncated_share, 0.5 * (limits.truncated_share or 0)):
        yield (
            "length_high",
            f"the share of responses that are cut off rose from {start:.0%} to {now:.0%}: the "
            "policy unlearns to end; raise `rollout.max_new_tokens`, or add `OverlongPenalty` or "
            "`Finished` to `rollout.rewards`",
        )
    # what stands in them
    start, now = trends.start("rollout/repetition"), trends.now("rollout/repetition")
    if _risen(start, now, limits.repetition, 0.2):
        yield (
            "repetition",
            f"{now:.0%} of the four-token sequences of a response repeat an earlier one, "
            f"{start:.0%} at first: the policy runs into loops; look into `completions/`, give "
            "loops less reward in `rollout.rewards`, or add `KLPenalty` to `objective.terms`",
        )
    start, now = trends.start("reward/answered"), trends.now("reward/answered")
    if start and now is not None and start >= 0.1 and _under(now, start, limits.answered_share):
        yield (
            "answered",
            f"an answer could be read in {now:.0%} of the completions, {start:.0%} at first: the "
            "policy unlearns the form of an answer; add a reward for the form to "
            "`rollout.rewards`, or `KLPenalty` to `objective.terms`",
        )
    now = trends.now("support/could_not_stop")
    if limits.could_not_stop and now is not None and now >= limits.could_not_stop:
        yield (
            "could_not_stop",
            f"{now:.0%} of the responses were cut off and could not end, as no support held an end "
            "token: raise `k`, `p` or `max_k` of `objective.support`, or `rollout.max_new_tokens`",
        )


def _reward(trends: Trends, limits: WatchdogLimits) -> Iterator[tuple[str, str]]:
    # few prompts with a gradient
    flat, accuracy = trends.now("rollout/groups_flat"), trends.now("reward/accuracy")
    if (
        limits.flat_share
        and flat is not None
        and accuracy is not None
        and limits.flat_share <= flat < 1
        and accuracy < 0.5
    ):
        yield (
            "sparse",
            f"{flat:.0%} of the prompts have completions of one reward, and {accuracy:.1%} of the "
            "completions are right: most sampling teaches nothing; set `rollout.dynamic`, raise "
            "`rollout.completions`, or take easier rows in `data`",
        )
    # the training reward falls
    now, best, spread = trends.now("reward/mean"), trends.best_reward, trends.spread
    if (
        limits.reward_fall
        and now is not None
        and best is not None
        and spread > 0
        and best - now > limits.reward_fall * spread
    ):
        yield (
            "fall",
            f"the training reward fell from {best:.3g} at its best to {now:.3g}, by "
            f"{(best - now) / spread:.2g} standard deviations: updates destroy what was learnt; "
            "go back to an earlier checkpoint, and lower the learning rate or set "
            "`trainer.gradient_clip_val`",
        )


def _evaluated(trends: Trends, limits: WatchdogLimits) -> Iterator[tuple[str, str]]:
    """Rules over measurements that do not come with each rollout."""
    # a metric that falls while the training reward rises
    for name, peak in trends.peaks.items():
        if limits.hacking and peak["falls"] >= 2:
            yield (
                f"hacking {name}",
                f"the training reward rose from {peak['reward']:.3g} to "
                f"{trends.now('reward/mean'):.3g} while `{name}` fell from {peak['best']:.3g} to "
                f"{peak['value']:.3g}: the policy may be hacking the reward; look into "
                f"`completions/`, change `rollout.rewards`, keep the checkpoint with the best "
                f"`{name}`, or add `KLPenalty` to `objective.terms`",
            )
    # a jump that stays, as single estimates of a divergence have heavy tails
    *past, before_last, last = trends.divergences if len(trends.divergences) > 2 else (0, 0, 0)
    low, high = min(before_last, last), max(past)
    if limits.kl_jump and low > high + limits.kl_jump and low > 3 * high:
        yield (
            "kl",
            f"the divergence from the reference jumped from {high:.3g} to {last:.3g} nats a token: "
            "an update went too far; lower the learning rate, set `trainer.gradient_clip_val`, or "
            "raise the coefficient of `KLPenalty`",
        )


def _under(now: float, start: float, share: float | None) -> bool:
    return share is not None and now < share * start


def _risen(start: float | None, now: float | None, level: float | None, rise: float) -> bool:
    if start is None or now is None or level is None:
        return False
    return now >= level and now >= start + rise


def _rises(trends: Trends) -> bool:
    """Whether the training reward has risen over the last rollouts."""
    before, now = trends.before("reward/mean"), trends.now("reward/mean")
    return before is not None and now is not None and now > before + 0.1 * trends.spread


def _fell(trends: Trends, spreads: float = 0.25) -> bool:
    """Whether the training reward is below its start, by a number of standard deviations."""
    start, now = trends.start("reward/mean"), trends.now("reward/mean")
    return start is not None and now is not None and now <= start - spreads * trends.spread


def _reward_now(trends: Trends) -> str:
    return f"{trends.start('reward/mean'):.3g} at first, {trends.now('reward/mean'):.3g} now"
