"""Each rule on invented figures: it holds beyond its limit, is silent below it, and can be switched off."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.metrics.alarms import WatchdogLimits, alarms
from lightning_mpo.metrics.trends import Trends
from tests.support.figures import course

FALLING = {"reward__mean": [0.5, 0.3, 0.2, 0.1, 0.1, 0.1]}
RISING = {"reward__mean": [0.5, 0.6, 0.6, 0.7, 0.7, 0.8]}
CASES = {
    "entropy_low": ({"policy__entropy": 0.09}, {"policy__entropy": 0.11}, "entropy_share"),
    "entropy_high": (
        FALLING | {"policy__entropy": 3.1},
        FALLING | {"policy__entropy": 2.9},
        "entropy_growth",
    ),
    "length_low": ({"rollout__length": 49}, {"rollout__length": 51}, "length_share"),
    "length_high": ({"rollout__truncated": 0.51}, {"rollout__truncated": 0.49}, "truncated_share"),
    "repetition": ({"rollout__repetition": 0.51}, {"rollout__repetition": 0.49}, "repetition"),
    "answered": ({"reward__answered": 0.4}, {"reward__answered": 0.5}, "answered_share"),
    "could_not_stop": (
        {"support__could_not_stop": 0.51},
        {"support__could_not_stop": 0.49},
        "could_not_stop",
    ),
    "sparse": (
        {"rollout__groups_flat": 0.91},
        {"rollout__groups_flat": 0.89},
        "flat_share",
    ),
    "fall": (
        {"reward__mean": [0.9, 0.9, 0.9, 0.3, 0.3, 0.3]},
        {"reward__mean": [0.9, 0.9, 0.9, 0.5, 0.5, 0.5]},
        "reward_fall",
    ),
    "kl": (
        {"kl__rollout_mean": [0.01, 0.02, 0.03, 0.04, 0.5, 0.6]},
        {"kl__rollout_mean": [0.01, 0.02, 0.03, 0.04, 0.2, 0.3]},
        "kl_jump",
    ),
    "hacking reward/accuracy": (
        RISING | {"reward__accuracy": [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]},
        RISING | {"reward__accuracy": [0.4, 0.4, 0.35, 0.35, 0.35, 0.35]},
        "hacking",
    ),
}
"""Cause -> (figures beyond its limit, figures just within, the limit)."""


def found(rollouts, limits=None) -> dict[str, str]:
    limits = limits or WatchdogLimits()
    trends = Trends(limits.window, limits.hacking or 0.0)
    for figures in rollouts:
        trends.add(figures, [name for name in ("reward/accuracy",) if name in figures])
    return alarms(trends, limits)


@pytest.mark.parametrize("cause", CASES)
def test_a_cause_is_told_beyond_its_limit_alone(cause):
    beyond, within, limit = CASES[cause]
    sentences = found(course(**beyond))
    assert cause in sentences
    assert cause not in found(course(**within))
    assert cause not in found(course(**beyond), WatchdogLimits(**{limit: None}))
    assert "`" in sentences[cause], "an option is named"
    assert any(character.isdigit() for character in sentences[cause])
    assert "\n" not in sentences[cause]
    assert not sentences[cause].endswith(".")


def test_every_limit_has_a_case():
    names = {item.name for item in dataclasses.fields(WatchdogLimits)} - {"window"}
    assert {limit for _, _, limit in CASES.values()} == names


def test_nothing_is_told_of_a_healthy_run_or_a_short_one():
    assert found(course(**RISING)) == {}
    assert found(course(rollout__length=1)[:5]) == {}


@pytest.mark.parametrize(
    ("cause", "excuse"),
    [
        ("entropy_low", RISING),
        ("entropy_low", {"reward__accuracy": 0.95}),
        ("entropy_high", RISING),
        ("length_low", RISING),
        ("sparse", {"reward__accuracy": 0.95}),
        ("hacking reward/accuracy", FALLING),
    ],
    ids=str,
)
def test_figures_that_explain_a_change_silence_it(cause, excuse):
    """A solved task needs no entropy, and short answers may be better ones."""
    assert cause not in found(course(**CASES[cause][0] | excuse))


@pytest.mark.parametrize(
    "values",
    [
        [0.01, 0.02, 0.02, 0.02, 5.0, 0.02],
        [0.1, 0.2, 0.3, 0.5, 0.7, 0.9],
        [2.0, 2.1, 2.2, 2.3, 3.0, 3.1],
    ],
    ids=["one measurement", "steady growth", "large already"],
)
def test_a_divergence_that_does_not_jump(values):
    assert "kl" not in found(course(kl__rollout_mean=values))


def test_a_measurement_that_is_logged_again_counts_once():
    """`KLTracking(every=3)`: a jump may stand in the log twice and was measured once."""
    values = [0.01, 0.02, 0.03, 0.04, 5.0, 5.0]
    assert "kl" not in found(course(kl__rollout_mean=values))


def test_what_was_high_from_the_start_is_no_change():
    for name in ("rollout/repetition", "rollout/truncated"):
        rollouts = [figures | {name: 0.7} for figures in course()]
        assert found(rollouts) == {}


def test_a_metric_that_some_rollouts_lack_is_not_judged():
    rollouts = course(policy__entropy=0.01)
    del rollouts[1]["policy/entropy"]
    assert found(rollouts) == {}


def test_held_out_accuracy_has_to_fall_twice():
    limits, trends = WatchdogLimits(), Trends(3)
    for figures in course(**RISING)[:6]:
        trends.add(figures)
    trends.compare("val/pass_at_1", 0.5)
    for figures in course(**RISING)[6:]:
        trends.add(figures)
    trends.compare("val/pass_at_1", 0.35)
    assert alarms(trends, limits) == {}
    trends.compare("val/pass_at_1", 0.3)
    assert alarms(trends, limits)["hacking val/pass_at_1"] == (
        "the training reward rose from 0.567 to 0.733 while `val/pass_at_1` fell from 0.5 to 0.3: the policy may be "
        "hacking the reward; look into `completions/`, change `rollout.rewards`, keep the checkpoint with the best "
        "`val/pass_at_1`, or add `KLPenalty` to `objective.terms`"
    )


def test_memory_is_bounded():
    trends = Trends(3)
    for i in range(100):
        trends.add({"reward/mean": float(i), "kl/reference": float(i)})
    state = trends.state_dict()
    assert [len(state[name]) for name in ("first", "last", "divergences")] == [3, 6, 5]


@pytest.mark.parametrize(
    ("option", "value"),
    [("window", 0), ("entropy_share", 1.0), ("entropy_growth", 1.0), ("kl_jump", 0.0)],
)
def test_limits_are_checked(option, value):
    with pytest.raises(UserError, match=f"`Watchdog.limits.{option}`"):
        WatchdogLimits(**{option: value})
