"""Runs with a curriculum: rollouts change its state, and a killed run goes on with that state."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.rollout import DynamicSampling
from tests.support.curricula import counted, still, train
from tests.support.runs import Digits, Run, same
from tests.support.two_processes import run_script


def resumable(folder, steps: int, **options) -> Run:
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    plan = {"minibatches": 2, "epochs": 2}
    return train(folder, max_steps=steps, callbacks=[save], rollout=plan, **options)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, str]:
    """An uninterrupted run of 12 updates, 4 of a rollout, that saved after each update."""
    folder = tmp_path_factory.mktemp("whole")
    return resumable(folder, 12), str(folder)


@pytest.mark.parametrize("at", [1, 4, 6, 9], ids=lambda at: f"after{at}")
def test_a_run_goes_on_with_the_state_of_its_curriculum(tmp_path, whole, at):
    """In the middle of a rollout (1, 6, 9) and at its end (4)."""
    run, folder = whole
    resumed = resumable(tmp_path, 12, ckpt_path=f"{folder}/step={at}.ckpt")
    assert same(resumed.weights, run.weights)
    assert resumed.record.without_clocks() == [
        line for line in run.record.without_clocks() if line[0] >= at
    ]
    assert torch.equal(counted(resumed), counted(run))


def test_without_its_state_a_run_would_go_on_otherwise(tmp_path, whole):
    """So the test above shows something."""
    content = torch.load(f"{whole[1]}/step=4.ckpt", weights_only=True)
    key = next(key for key in content["callbacks"] if key.startswith("RolloutLoop"))
    assert content["callbacks"][key]["curriculum"]["counts"].sum() > 0
    content["callbacks"][key]["curriculum"]["counts"] = None
    torch.save(content, tmp_path / "other.ckpt")
    resumed = resumable(tmp_path, 12, ckpt_path=f"{tmp_path}/other.ckpt")
    assert not same(resumed.weights, whole[0].weights)


def test_counts_are_those_of_all_completions(tmp_path):
    """With prompts that are redrawn and dropped, too."""
    for dynamic in (None, DynamicSampling(3)):
        run, watch = train(tmp_path, max_steps=5, rollout={"dynamic": dynamic})
        expected: dict[str, list[float]] = {}
        for _, drawn in watch.events:
            for part, _ in drawn:
                for row, text in zip(part.rows, part.texts, strict=True):
                    right = sum(c in "01234" for c in text) / max(len(text), 1) > 0.75
                    counts = expected.setdefault(row.prompt, [0.0, 0.0])
                    counts[0] += right
                    counts[1] += 1
        rows = run.trainer.datamodule.splits.train
        assert counted(run).tolist() == [expected.get(row.prompt, [0.0, 0.0]) for row in rows]
        assert 0 < counted(run)[:, 0].sum() < counted(run)[:, 1].sum()
        shares = run.record.column("rollout/open_rows")
        assert shares[0] == 1
        assert shares[-1] < 1


def test_a_run_that_begins_with_another_curriculum_is_refused(tmp_path, whole):
    with pytest.raises(UserError, match="has counts of 12 rows, and there are 9"):
        resumable(tmp_path, 12, ckpt_path=f"{whole[1]}/step=4.ckpt", train_problems=9)


def test_a_reward_that_says_what_is_right_is_needed(tmp_path):
    with pytest.raises(UserError, match="`data.curriculum: SuccessRate` needs a reward that says"):
        train(tmp_path, max_steps=1, rollout={"rewards": [Digits()]})


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    """With the same samples, the same rows are drawn and counted; each process goes on exactly."""
    run_script("two_ranks_curriculum.py", tmp_path)
    single = still(tmp_path / "one", devices=1)
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["counts"] == counted(single).tolist()
        assert result["off"] == 0.0
        assert result["resumed"] == result["counts"]
