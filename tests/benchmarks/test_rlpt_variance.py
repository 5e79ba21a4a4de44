"""The variance study of RLPT: traces against naive loops, limits, and the inequality."""

from __future__ import annotations

import csv
import json
import math
import string
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from tests.support.builders import VOCABULARY, make_rollout

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "rlpt"
sys.path.insert(0, str(SCRIPTS))
import gradient_variance as study  # noqa: E402

sys.path.remove(str(SCRIPTS))

PROMPTS, RESPONSES = [3, 5, 4], [4, 1, 2, 6, 3, 3]


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy()


def naive(policy, rollout, mask_BT, temperature):
    """Return the gradients of all samples, from the dense log-softmax of plain forward passes."""
    S, found = rollout.prompt_length, []
    for b in range(len(rollout.group_B)):
        ids = rollout.tokens_BL[b : b + 1]
        seen = rollout.attention_mask_BL[b : b + 1].long()
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = policy.network(ids, seen, positions).logits[0, S - 1 : -1] / temperature
        if rollout.support_BTK is not None:
            outside = torch.ones_like(logits, dtype=torch.bool).scatter(
                1, rollout.support_BTK[b].long(), False
            )
            logits = logits.masked_fill(outside, -1e9)
        chosen = logits.log_softmax(-1).gather(1, rollout.responses_BT[b][:, None])[:, 0]
        found.append(torch.autograd.grad(chosen[mask_BT[b]].sum(), policy.parts()["policy"]))
    return torch.stack([torch.cat([part.flatten() for part in one]) for one in found])


@pytest.mark.parametrize("support", [None, 5])
def test_the_variance_is_the_trace_of_the_covariance(policy, support):
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    mask = rollout.response_mask_BT.clone()
    mask[0, 1] = False  # a token without loss
    gradients = naive(policy, rollout, mask, 0.7).double()
    sums = study.moments(policy, rollout, mask, 0.7)
    assert sums.variance() == pytest.approx(gradients.var(0).sum().item(), rel=1e-4)
    assert sums.variance(without=1) == pytest.approx(
        gradients[[0, 1, 4, 5]].var(0).sum().item(), rel=1e-4
    )


def test_a_support_of_everything_is_the_whole_vocabulary(policy):
    rollout = make_rollout(PROMPTS, RESPONSES)
    same, inside = study.with_top_k(policy, rollout, VOCABULARY)
    assert inside.equal(rollout.response_mask_BT)
    ratio, low, high = study.compare(
        study.moments(policy, same, inside, 1.0), study.moments(policy, rollout, inside, 1.0)
    )
    assert [ratio, low, high] == pytest.approx([1, 1, 1], rel=1e-3)


def test_tokens_outside_the_top_k_carry_no_loss(policy):
    rollout = make_rollout(PROMPTS, RESPONSES)
    same, inside = study.with_top_k(policy, rollout, 5)
    hits = (same.support_BTK == rollout.responses_BT[..., None]).any(-1) & rollout.response_mask_BT
    assert inside.equal(hits)
    assert 0 < inside.sum() < rollout.response_mask_BT.sum()


def test_the_score_variances_are_those_of_the_softmax(policy):
    rollout = make_rollout([4], [5])
    (row,) = study.score_variances(policy, rollout, [3], 0.7)
    with torch.no_grad():
        logits = (
            policy.network(rollout.tokens_BL).logits[0, rollout.prompt_length - 1 : -1].double()
            / 0.7
        )
    p = logits.softmax(-1)
    best = p.topk(3).values
    assert row["full"] == pytest.approx((1 - p.square().sum(-1)).mean().item(), rel=1e-5)
    assert row["mass"] == pytest.approx(best.sum(-1).mean().item(), rel=1e-5)
    kept = best / best.sum(-1, keepdim=True)
    assert row["support"] == pytest.approx((1 - kept.square().sum(-1)).mean().item(), rel=1e-5)
    assert row["support"] < row["full"]
    assert row["violations"] == 0


@pytest.mark.slow
def test_the_command_prints_its_table_and_goes_on_from_frozen_rollouts(
    tiny_policy, tmp_path, monkeypatch, capsys
):
    letters = string.ascii_letters + string.digits + " .?\n"  # those of the instruction
    policy = tiny_policy(
        characters=letters, sharp=1.0
    )  # flat, so that samples differ and have a variance
    policy.network.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "SVAMP.json"
    rows = [
        {"Body": f"There are {n} cups.", "Question": "How many?", "Answer": n} for n in range(12)
    ]
    data.write_text(json.dumps(rows))
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(data),
        "--sizes",
        "2",
        "4",
        "--prompts",
        "3",
        "--completions",
        "8",
    ]
    arguments += ["--max-new-tokens", "6", "--out", str(tmp_path)]
    study.main(arguments)
    first = (tmp_path / "variance.csv").read_text()
    assert "| K | kept mass |" in capsys.readouterr().out
    found = list(csv.DictReader(first.splitlines()))
    assert [row["K"] for row in found] == ["2", "4"]
    assert all(row["violations"] == "0" and math.isfinite(float(row["own"])) for row in found)
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(study.LocalSampler, "sample", None)  # nothing is sampled again
    study.main(arguments)
    assert (tmp_path / "variance.csv").read_text() == first
    with pytest.raises(
        UserError,
        match=f"`--sizes` must be at most the vocabulary size {len(policy.tokenizer)}, got 999",
    ):
        study.main([*arguments, "--sizes", "999"])
