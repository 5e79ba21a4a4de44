"""The study tool: what is done is not run again, pairs are by seed, and intervals are Student's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.study_scripts import plain, plain_drawing, plain_table

ROOT = Path(__file__).parents[2]
SUMMARY = {"warmup": {"pass_at_1": 0.5}, "seconds": {"training": 160.0}, "updates": 160}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "runs": "runs/s",
        "seeds": [0, 1, 2],
        "tasks": {"t": {"config": "t.yaml", "warmup": "w.yaml", "checkpoint": "warm-{seed}.ckpt"}},
        "cells": {"base": {"config": "b.yaml"}, "other": {"config": "o.yaml", "against": "base"}},
    }
    Path("s.yaml").write_text(yaml.safe_dump(content))
    return plain.Study.read(Path("s.yaml"))


def finish(study, cell, seed, score):
    folder = study.folder("t", cell, seed)
    folder.mkdir(parents=True, exist_ok=True)
    final = {"pass_at_1": score, "greedy_accuracy": 0.9, "clip_fraction": 0.01, "kl": 0.02}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"final": final}))


def test_runs_what_is_missing_and_only_that(study, monkeypatch):
    asked = []
    monkeypatch.setattr(
        plain, "_fit", lambda arguments, folder, threads: asked.append((arguments, folder))
    )
    finish(study, "base", 1, 0.8)
    Path("warm-0.ckpt").touch()
    assert plain.run_all(study, 1, 1) == []
    warmups, cells = asked[:2], asked[2:]
    assert [arguments[-1] for arguments, _ in warmups] == ["1", "2"]
    assert {(str(folder), arguments[3]) for arguments, folder in cells} == {
        (f"runs/s/t/{cell}/seed{seed}", config)
        for seed in range(3)
        for cell, config in (("base", "b.yaml"), ("other", "o.yaml"))
        if (cell, seed) != ("base", 1)
    }


def test_a_task_may_do_without_a_warmup(study, monkeypatch):
    asked = []
    monkeypatch.setattr(plain, "_fit", lambda arguments, folder, threads: asked.append(arguments))
    assert plain.run_all(replace(study, tasks={"t": {"config": "t.yaml"}}), 1, 1) == []
    assert len(asked) == 6


def test_a_run_that_fails_is_named_and_the_others_go_on(study, monkeypatch):
    def fit(arguments, folder, threads):
        return f"{folder}/run.log" if "seed1" in str(folder) else None

    monkeypatch.setattr(plain, "_fit", fit)
    assert plain.run_all(study, 1, 1) == [
        "runs/s/t/base/seed1/run.log",
        "runs/s/t/other/seed1/run.log",
    ]


def test_pairs_are_by_seed(study):
    for seed, score in enumerate((0.6, 0.7, 0.8)):
        finish(study, "base", seed, score)
    finish(study, "other", 0, 0.61)
    finish(study, "other", 2, 0.83)
    assert plain_table.differences_of(study, "t", "other", "base") == [
        pytest.approx(0.01),
        pytest.approx(0.03),
    ]
    row = plain_table.table(study).splitlines()[-1]
    assert "| other | 2 |" in row
    assert "+0.020 ± 0.127" in row
    assert "0.700 ± 0.248" in plain_table.table(study)
    plain_drawing.draw(study, Path("picture.png"))
    assert Path("picture.png").stat().st_size > 1000


def test_rollouts_to_a_level_lie_on_a_line_between_validations():
    curve = [
        {"accuracy": 0.5},
        {"accuracy": 0.5},
        {"validation": 0.7},
        {"accuracy": 0.5},
        {"validation": 0.6},
    ]
    summary = {"warmup": {"pass_at_1": 0.5}, "curve": curve}
    assert plain_table.rollouts_to(summary, 0.6) == pytest.approx(
        1.0
    )  # half-way from 0.5 (0) to 0.7 (2)
    assert plain_table.rollouts_to(summary, 0.5) == 0.0
    assert plain_table.rollouts_to(summary, 0.71) is None
    assert plain_table._reach({0: summary, 1: summary | {"curve": []}}, 0.7) == "2.0 (1 never)"
    late = summary | {"curve": [{"accuracy": 0.5}] * 2 + curve}
    assert (
        plain_table._reach({0: late, 2: late}, 0.6, {0: summary, 1: summary, 2: late})
        == "2.0, paired +0.5 ± 6.4"
    )


def test_a_table_with_levels_has_a_column_for_each(study):
    finish(study, "base", 0, 0.8)
    path = study.folder("t", "base", 0) / "summary.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"curve": [{"accuracy": 0.5}, {"validation": 0.9}]}
        )
    )
    head, rule, row = plain_table.table(replace(study, levels=(0.7,))).splitlines()
    assert head.endswith("rollouts to 0.7 |")
    assert row.endswith("| 0.5 |")
    assert head.count("|") == rule.count("|") == row.count("|")


def test_a_run_with_accounted_memory_gets_a_column_for_the_update(study):
    finish(study, "base", 0, 0.8)
    finish(study, "other", 0, 0.8)
    assert "peak of the update" not in plain_table.table(study)
    sizes = {"load": 900, "forward": 300, "backward": 250, "optimiser": 310}
    written = {
        "baseline": 110 * 2**20,
        "peaks": {phase: {"in_use": size * 2**20} for phase, size in sizes.items()},
    }
    (study.folder("t", "base", 0) / "memory.json").write_text(json.dumps(written))
    head, rule, base, other = plain_table.table(study).splitlines()
    assert head.endswith("| peak of the update |")
    assert base.endswith("| 200 MiB |")
    assert other.endswith("|  |")
    assert head.count("|") == rule.count("|") == base.count("|") == other.count("|")


def test_every_file_of_the_studies_is_there():
    for path in (ROOT / "benchmarks" / "studies").rglob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        named = [cell["config"] for cell in content.get("cells", {}).values()]
        named += [
            task[key]
            for task in content.get("tasks", {}).values()
            for key in ("config", "warmup")
            if key in task
        ]
        assert all((ROOT / name).is_file() for name in named), path
        assert all((path.parent / name).resolve().is_file() for name in content.get("include", []))
