"""Metrics by level: against loops over the rows of a rollout, on one process and over two."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.data import Delimiters, Scaffolded
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rollout.collect import Collector
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.sampling import LocalSampler
from tests.support.runs import Digits, make_data, make_objective, make_policy

PARTS = ("reward/level", "reward/accuracy_level", "rollout/groups_flat_level")


def collect(levels=None):
    """Return a rollout on scaffolds."""
    data, policy = Scaffolded(make_data(), splitter=Delimiters(",;"), levels=levels), make_policy()
    policy.build(device=torch.device("cpu"), reference=False)
    data.connect(policy.tokenizer)
    rewards = [Digits()]
    collector = Collector(
        scorer=Scorer(policy),
        objective=make_objective(),
        prompts=data,
        sampler=LocalSampler(),
        judge=lambda rollout: score_all(rewards, completions_of(rollout)),
        schedule=Schedule(8, 3, minibatches=1, epochs=1),
        max_new_tokens=6,
        seed=2,
    )
    return data, collector.collect(0)


def test_reward_and_flat_groups_by_level_are_those_of_a_loop():
    data, collected = collect()
    rollout, rewards_B = collected.event.experience.rollout, collected.event.scores.rewards_B
    rows: dict[int, dict[int, list[float]]] = {}
    for row, group, reward in zip(rollout.rows, rollout.group_B.tolist(), rewards_B, strict=True):
        rows.setdefault(row.extra["level"], {}).setdefault(group, []).append(float(reward))
    assert len(rows) > 1
    for level in data.reported_levels.values:
        name = f"level_{level}"
        if level not in rows:
            assert not any(f"{part}_{level}" in collected.metrics for part in PARTS)
            continue
        all_rewards = [reward for group in rows[level].values() for reward in group]
        flat = [len(set(group)) == 1 for group in rows[level].values()]
        mean = sum(all_rewards) / len(all_rewards)
        assert collected.metrics[f"reward/{name}"] == pytest.approx(mean)
        assert collected.metrics[f"rollout/groups_flat_{name}"] == pytest.approx(
            sum(flat) / len(flat)
        )


def test_a_level_without_prompts_has_sums_on_each_process_and_no_metric():
    _, collected = collect(levels=[0, 1])
    event = collected.event
    lacking = [row.extra["level"] for row in event.experience.rollout.rows]
    assert set(lacking) == {0, 1}
    names = [name for name in event.sums() if "level_" in name]
    assert names == [f"{part}_{level}" for level in (0, 1) for part in PARTS]
    # processes add up sums of the same names, also where one of them has no row of a level
    wider = type(event.levels)(event.levels.column, (0, 1, 7))
    object.__setattr__(event, "levels", wider)
    assert event.sums()["reward/level_7"] == (0.0, 0.0)
    assert not any("level_7" in name for name in event.metrics(lambda sums: sums))
    assert "reward/level_1" in event.metrics(lambda sums: sums)


def test_data_without_levels_have_no_metrics_by_level():
    assert make_data().reported_levels is None
