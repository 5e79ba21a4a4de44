"""The analyses of MPO: the frozen rollout, reliability, and every script end to end on it."""

from __future__ import annotations

import csv
import math
import sys

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.policies import MedusaHeads, ParallelHeads, SequentialHeads
from lightning_mpo.rollout import load_rollout, save_rollout
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout, naive_logprobs
from tests.support.mpo_checkpoints import write_checkpoint
from tests.support.mpo_scripts import (
    clip_fraction,
    common,
    freeze,
    ratio_variance,
    reliability,
    signal_to_noise,
)
from tests.support.runs import Digits

PNG = b"\x89PNG\r\n\x1a\n"
EACH = {
    "ratio_variance": ratio_variance,
    "clip_fraction": clip_fraction,
    "signal_to_noise": signal_to_noise,
}


def read(folder, name):
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


# --- the frozen rollout -------------------------------------------------------------------------------------------


def test_the_frozen_file_holds_both_policies(checkpoint, frozen_path):
    rollout, tensors = load_rollout(frozen_path)
    mask = rollout.response_mask_BT
    assert len(rollout.rows) == len(rollout.texts) == 32
    torch.testing.assert_close(
        tensors["old_logprobs_BT"], rollout.behaviour_logprobs_BT, rtol=0, atol=1e-4
    )
    advantages = group_relative(tensors["rewards_B"], 4)
    assert torch.equal(tensors["advantages_BT"], advantages[:, None] * mask)
    request = ScoreRequest(future=2)
    for path, prefix in ((checkpoint, "old_"), (frozen_path.with_suffix(".ckpt"), "")):
        scores = freeze.score(common.load_policy(path), rollout, request)
        torch.testing.assert_close(
            tensors[f"{prefix}logprobs_BT"], scores.logprobs_BT, rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            tensors[f"{prefix}future_BTM"], scores.future_BTM, rtol=0, atol=1e-4
        )
    moved = (tensors["logprobs_BT"] - tensors["old_logprobs_BT"])[mask]
    assert float(moved.std()) > 0.05
    gain = (moved * tensors["advantages_BT"][mask]).mean()
    assert gain > 0, "the updates go where the advantage points"


def test_the_updates_leave_the_heads_alone(checkpoint, frozen_path):
    before = torch.load(checkpoint)["state_dict"]
    after = torch.load(frozen_path.with_suffix(".ckpt"))["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if ".mtp." in name]


def test_a_policy_without_heads_has_backbone_ratios_only(tmp_path, monkeypatch):
    start = write_checkpoint(tmp_path / "start.ckpt", None)
    monkeypatch.setattr(freeze, "ExactAnswer", Digits)
    out = tmp_path / "frozen.safetensors"
    options = ["--prompts", "4", "--completions", "3", "--max-new-tokens", "6", "--drift", "1"]
    freeze.main(["--checkpoint", start, "--out", str(out), *options])
    frozen = common.Frozen.load(out)
    assert frozen.offsets == 0
    assert {row["source"] for row in ratio_variance.measure(frozen, 3)} == {"backbone"}
    with pytest.raises(UserError, match="has 0 offsets of multi-token heads, 1 are needed"):
        frozen.log_ratios(1)


def test_rewards_that_are_all_equal_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="there is no advantage"):
        freeze.main(
            [
                "--checkpoint",
                checkpoint,
                "--out",
                str(tmp_path / "x"),
                "--prompts",
                "2",
                "--completions",
                "2",
            ]
        )


def test_more_offsets_than_heads_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="need 3 future offsets"):
        freeze.main(["--checkpoint", checkpoint, "--out", str(tmp_path / "x"), "--offsets", "3"])


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.ckpt").write_text("hello")
    torch.save({"state_dict": {"policy.weight": torch.zeros(1)}}, tmp_path / "b.ckpt")
    for name, message in (
        ("a", "cannot be read as a checkpoint"),
        ("b", "is no checkpoint of the quickstart"),
        ("c", ""),
    ):
        with pytest.raises(UserError, match=message) as caught:
            common.load_policy(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)


# --- reliability --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [ParallelHeads, SequentialHeads, MedusaHeads, None])
def test_reliability_is_that_of_plain_argmaxes(family, tmp_path):
    path = write_checkpoint(tmp_path / "start.ckpt", family and family(offsets=2))
    policy = common.load_policy(path)
    rollout = common.sample(policy, 4, 2, held_out=True, max_new_tokens=8, seed=0)
    rows = reliability.measure(policy, rollout, "here")
    assert [row["offset"] for row in rows] == ([0, 1, 2] if family else [0])
    logprobs = naive_logprobs(policy.network, rollout)[0]
    assert rows[0]["cross-entropy"] == pytest.approx(-float(torch.cat(logprobs).mean()), rel=1e-4)
    right = []
    for b in range(8):
        ids = rollout.tokens_BL[b][rollout.attention_mask_BL[b]][None]
        length = int(rollout.response_mask_BT[b].sum())
        best = policy.network(input_ids=ids).logits[0].argmax(-1)
        right.append((best[-length - 1 : -1] == ids[0, -length:]).double())
    assert rows[0]["accuracy"] == pytest.approx(float(torch.cat(right).mean()))
    assert rows[0]["tokens"] == len(torch.cat(right))
    totals = torch.stack([torch.cat(right[i : i + 2]).sum() for i in range(0, 8, 2)])
    counts = torch.tensor([len(right[i]) + len(right[i + 1]) for i in range(0, 8, 2)])
    residuals = totals - rows[0]["accuracy"] * counts
    half = 1.96 * math.sqrt(4 / 3 * float(residuals.square().sum())) / int(counts.sum())
    assert rows[0]["accuracy low"] == pytest.approx(max(rows[0]["accuracy"] - half, 0.0), rel=1e-6)


def test_reliability_compares_checkpoints(checkpoint, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "medusa.ckpt", MedusaHeads(offsets=1))
    options = [
        "--prompts",
        "4",
        "--completions",
        "2",
        "--max-new-tokens",
        "6",
        "--out",
        str(tmp_path),
    ]
    reliability.main(
        [
            "--checkpoint",
            checkpoint,
            "--checkpoint",
            other,
            "--label",
            "a",
            "--label",
            "b",
            *options,
        ]
    )
    rows = read(tmp_path, "reliability")
    assert [(row["checkpoint"], row["family"], row["offset"]) for row in rows] == [
        ("a", "parallel", "0"), ("a", "parallel", "1"), ("a", "parallel", "2"), ("b", "medusa", "0"), ("b", "medusa", "1"),
    ]  # fmt: skip
    assert "| checkpoint | family |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reliability.main(["--checkpoint", checkpoint, "--label", "a", "--label", "b", *options])


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_every_script_writes_its_table_and_picture(name, frozen_path, tmp_path, capsys):
    options = {
        "ratio_variance": ["--longest", "3"],
        "clip_fraction": ["--lengths", "2", "3", "--shares", "0", "0.3"],
        "signal_to_noise": ["--lengths", "2", "3", "--shares", "0.3"],
    }[name]
    EACH[name].main(["--frozen", str(frozen_path), "--out", str(tmp_path), *options])
    rows, printed = read(tmp_path, name), capsys.readouterr().out
    assert len(rows) == {"ratio_variance": 42, "clip_fraction": 8, "signal_to_noise": 11}[name]
    assert f"wrote {tmp_path / name}.csv" in printed
    assert f"wrote {tmp_path / name}.png" in printed
    assert printed.count("\n| ") == len(rows) or printed.count("\n|") == len(rows) + 2


@pytest.mark.parametrize("name", EACH)
def test_a_rollout_that_is_missing_or_bare_is_one_line(name, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare.safetensors"
    save_rollout(bare, make_rollout([3], [2, 1]))
    for path, message in (
        (tmp_path / "none", "cannot be read"),
        (bare, "is a rollout without advantages_BT"),
    ):
        monkeypatch.setattr(
            sys, "argv", [f"{name}.py", "--frozen", str(path), "--out", str(tmp_path)]
        )
        with pytest.raises(SystemExit, match=message) as caught:
            common.run(EACH[name].main)
        assert "\n" not in str(caught.value)
