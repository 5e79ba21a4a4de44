"""The analyses of MPO: every script end to end on a tiny frozen rollout, and its numbers against hand computations."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.objective.action_spaces import FutureShare, SequenceActions, TokenActions
from lightning_mpo.policies import MedusaHeads, MTPHeads, ParallelHeads, SequentialHeads, TinyPolicy
from lightning_mpo.rollout import load_rollout, save_rollout
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout, naive_logprobs, right_padded, seeded
from tests.support.runs import Digits

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "mpo"
sys.path.insert(0, str(SCRIPTS))
import clip_fraction  # noqa: E402
import common  # noqa: E402
import freeze  # noqa: E402
import ratio_variance  # noqa: E402
import reliability  # noqa: E402
import signal_to_noise  # noqa: E402

sys.path.remove(str(SCRIPTS))

PNG = b"\x89PNG\r\n\x1a\n"
EACH = {
    "ratio_variance": ratio_variance,
    "clip_fraction": clip_fraction,
    "signal_to_noise": signal_to_noise,
}


def write_checkpoint(path: Path, mtp: MTPHeads | None) -> str:
    """Write a tiny policy over the quickstart's alphabet, sharp and with heads that differ from the trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = TinyPolicy(
            common.CHARACTERS,
            hidden_size=32,
            layers=2,
            heads=4,
            intermediate_size=48,
            mtp=mtp,
            max_length=64,
        )
        policy.build(device=torch.device("cpu"), reference=False)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(4.0).add_(
                    0.05 * torch.randn(weight.shape)
                ) if weight.ndim == 2 else None
    path.parent.mkdir(parents=True, exist_ok=True)
    freeze.save_weights(policy, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("policy") / "start.ckpt", ParallelHeads(offsets=2)
    )


@pytest.fixture(scope="module")
def frozen_path(checkpoint, tmp_path_factory):
    """A rollout of 8 prompts x 4 completions, frozen; graded rewards, as an untrained policy adds nothing up."""
    path = tmp_path_factory.mktemp("frozen") / "frozen.safetensors"
    options = [
        "--prompts",
        "8",
        "--completions",
        "4",
        "--max-new-tokens",
        "10",
        "--learning-rate",
        "0.01",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "ExactAnswer", Digits)
        freeze.main(["--checkpoint", checkpoint, "--out", str(path), *options])
    return path


def by_hand(log_ratios, advantages, lengths=None, future=None):
    """Return a frozen rollout with given log-ratios; `future` is [B, T, M]."""
    log_ratios, advantages = torch.tensor(log_ratios), torch.tensor(advantages)
    B, T = log_ratios.shape
    rollout = make_rollout([2], [T] * B)
    mask = right_padded(lengths or [T] * B, T)
    object.__setattr__(rollout, "response_mask_BT", mask)
    zeros = torch.zeros(B, T)
    more = {}
    if future is not None:
        ahead = torch.tensor(future)
        more = {"old_future_BTM": torch.zeros_like(ahead), "future_BTM": ahead}
    return common.Frozen(rollout, advantages[:, None] * mask, zeros, log_ratios, **more)


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


# --- variance of the ratio ----------------------------------------------------------------------------------------


def test_spread_of_pairs_by_hand():
    frozen = by_hand([[0.1, 0.3, -0.2, 0.5]], [1.0])
    rows = {(row["weights"], row["N"]): row for row in ratio_variance.measure(frozen, 2)}
    joint, uniform = torch.tensor([0.4, 0.1, 0.3]), torch.tensor([0.2, 0.05, 0.15])
    assert rows["joint", 2]["std log R"] == pytest.approx(float(joint.std()), rel=1e-5)
    assert rows["uniform", 2]["std log R"] == pytest.approx(float(uniform.std()), rel=1e-5)
    assert rows["uniform", 2]["var R"] == pytest.approx(float(uniform.exp().var()), rel=1e-5)
    weights = uniform.exp()
    ess = float(weights.sum() ** 2 / (3 * weights.square().sum()))
    assert rows["uniform", 2]["effective samples"] == pytest.approx(ess, rel=1e-5)
    first, second = torch.tensor([0.1, 0.3, -0.2]).std(), torch.tensor([0.3, -0.2, 0.5]).std()
    share = rows["share 40 %", 2]
    assert share["s sqrt(sum beta^2)"] == pytest.approx(
        float(first) * math.sqrt(0.6**2 + 0.4**2), rel=1e-5
    )
    assert share["sqrt(sum beta^2 s_n^2)"] == pytest.approx(
        math.hypot(0.6 * first, 0.4 * second), rel=1e-5
    )


def test_independent_ratios_spread_as_predicted():
    log_ratios = 0.1 * torch.randn(400, 40, generator=seeded(0))
    rows = ratio_variance.measure(by_hand(log_ratios.tolist(), [1.0] * 400), 5)
    assert {row["N"] for row in rows} == set(range(1, 6))
    for row in rows:
        assert row["std log R"] == pytest.approx(row["s sqrt(sum beta^2)"], rel=0.04)


def test_heads_are_read_from_their_own_columns():
    frozen = by_hand([[0.1, 0.3, -0.2]], [1.0], future=[[[1.0, 7.0], [2.0, 7.0], [9.0, 7.0]]])
    rows = {
        (row["source"], row["weights"], row["N"]): row for row in ratio_variance.measure(frozen, 2)
    }
    assert rows["mtp", "joint", 2]["std log R"] == pytest.approx(
        float(torch.tensor([1.1, 2.3]).std()), rel=1e-5
    )
    assert rows["mtp", "joint", 1]["std log R"] == rows["backbone", "joint", 1]["std log R"]
    assert max(row["N"] for row in ratio_variance.measure(by_hand([[0.1] * 9], [1.0], future=[[[0.0]] * 9]), 4)
               if row["source"] == "mtp") == 2  # fmt: skip


def test_blocks_longer_than_any_response_are_refused():
    with pytest.raises(UserError, match="lower --longest"):
        ratio_variance.measure(by_hand([[0.1, 0.2]], [1.0]), 3)


# --- clip fraction ------------------------------------------------------------------------------------------------


def test_clip_fraction_and_its_match_by_hand():
    up, down = math.log(1.5), math.log(0.7)
    frozen = by_hand([[up, up, 0.0, 0.0], [down, 0.0, up, 0.0]], [1.0, -1.0])
    (row,) = clip_fraction.measure(frozen, [2], [0.5], 0.2)
    # halves of neighbours, absorbed at the end: up: 1.5, 1.22, 1, 1 of which two clip; down: 0.84 does not clip
    assert row["clip fraction"] == pytest.approx(2 / 8)
    # three tokens of eight clip at 0.2; the third largest distance is 1 - sqrt(0.7) = 0.163, the next ones are 0
    assert row["matched epsilon"] == pytest.approx((1 - math.sqrt(0.7)) / 2, rel=1e-4)
    assert row["clip fraction there"] == pytest.approx(3 / 8)
    assert row["epsilon sqrt(sum beta^2)"] == pytest.approx(0.2 * math.sqrt(0.5))
    # 1.5^0.707 = 1.33 clips, 0.7^0.707 = 0.777 clips
    assert row["mechanical clip fraction"] == pytest.approx(3 / 8)


def test_a_share_of_nothing_is_the_token_level(frozen_path):
    frozen = common.Frozen.load(frozen_path)
    token = frozen.clip_fraction(TokenActions(), 0.2)
    assert 0.02 < token < 0.9
    for row in clip_fraction.measure(frozen, [2, 3, 5], [0.0], 0.2):
        assert row["clip fraction"] == row["mechanical clip fraction"] == pytest.approx(token)
    count = int(frozen.mask_BT.sum())
    for row in clip_fraction.measure(frozen, [2, 3, 5], [0.1, 0.5], 0.2):
        assert row["clip fraction there"] == pytest.approx(token, abs=1.5 / count)


def test_normal_ratios_clip_as_predicted():
    log_ratios = 0.15 * torch.randn(400, 40, generator=seeded(1))
    frozen = by_hand(log_ratios.tolist(), [1.0, -1.0] * 200)
    for row in clip_fraction.measure(frozen, [5], [0.2, 0.4], 0.2):
        assert row["clip fraction"] == pytest.approx(row["mechanical clip fraction"], abs=0.01)
        assert row["matched epsilon"] == pytest.approx(row["epsilon sqrt(sum beta^2)"], rel=0.06)


def test_a_policy_that_did_not_move_is_refused():
    with pytest.raises(UserError, match="clips nothing"):
        clip_fraction.measure(by_hand([[0.0, 0.1]], [1.0]), [2], [0.1], 0.2)


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


# --- signal to noise ----------------------------------------------------------------------------------------------


def naive_gradients(policy, frozen, loss_of):
    """Return each prompt's gradient of its part of a loss over tokens, times the prompts. Shape [P, D]."""
    rollout, mask = frozen.rollout, frozen.mask_BT
    rows = []
    for p in range(8):
        logprobs = naive_logprobs(policy.network, rollout)[0]
        loss = sum(
            loss_of(logprobs[b] - frozen.old_logprobs_BT[b][mask[b]], frozen.advantages_BT[b, 0])
            for b in range(4 * p, 4 * p + 4)
        )
        policy.zero_grad()
        (8 * loss / mask.sum()).backward()
        rows.append(torch.cat([weight.grad.flatten() for weight in policy.parts()["policy"]]))
    return torch.stack(rows).double()


def clipped_sum(log_ratios, advantage):
    ratios = log_ratios.exp()
    return -torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage).sum()


def pairs_sum(log_ratios, advantage):
    later = torch.cat([log_ratios[1:], torch.zeros(1)])  # absorbed: nothing behind the end
    return clipped_sum(0.6 * log_ratios + 0.4 * later, advantage)


def sequence_sum(log_ratios, advantage):
    return len(log_ratios) * clipped_sum(log_ratios.mean()[None], advantage)


@pytest.mark.parametrize(
    ("name", "space", "loss_of"),
    [
        ("token", TokenActions(), clipped_sum),
        ("pairs", common.blocks(2, FutureShare(0.4), "backbone"), pairs_sum),
        ("sequence", SequenceActions(), sequence_sum),
    ],
)
def test_gradients_and_their_noise_are_the_definition(
    frozen_path, monkeypatch, name, space, loss_of
):
    frozen = common.Frozen.load(frozen_path)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    monkeypatch.setattr(signal_to_noise, "spaces", lambda *_: {name: space})
    (setting,) = [
        s for s in signal_to_noise.make_settings(frozen, [], [], 0.2) if s.clip == "equal"
    ]
    (sums,) = signal_to_noise.gradients(policy, frozen, [setting])
    x = naive_gradients(policy, frozen, loss_of)
    mean, noise = x.mean(0), float(x.var(0).sum()) / 8
    torch.testing.assert_close(sums.mean_D, mean, rtol=1e-3, atol=float(mean.abs().max()) * 1e-4)
    value, without = sums.ratios()
    assert value == pytest.approx((float(mean.square().sum()) - noise) / noise, rel=1e-3, abs=1e-4)
    kept = x[[p for p in range(8) if p % 4 != 1]]  # four blocks of two prompts
    noise = float(kept.var(0).sum()) / 6
    assert without[1] == pytest.approx(
        (float(kept.mean(0).square().sum()) / noise - 1) * 8 / 6, rel=1e-3, abs=1e-4
    )


def test_blocks_of_heads_use_as_many_offsets_as_they_need(frozen_path, monkeypatch):
    frozen = common.Frozen.load(frozen_path)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    found = {
        "N=2": common.blocks(2, FutureShare(0.4), "mtp"),
        "N=3": common.blocks(3, FutureShare(0.4), "mtp"),
    }
    monkeypatch.setattr(signal_to_noise, "spaces", lambda *_: found)
    settings = [s for s in signal_to_noise.make_settings(frozen, [], [], 0.2) if s.clip == "equal"]
    mask, advantages = frozen.mask_BT, frozen.advantages_BT
    for (name, betas), sums in zip(
        {"N=2": [0.6, 0.4], "N=3": [0.6, 0.2, 0.2]}.items(),
        signal_to_noise.gradients(policy, frozen, settings),
        strict=True,
    ):
        scores = policy.score(frozen.rollout, mask, temperature=1.0, request=ScoreRequest(future=2))
        log_ratios = betas[0] * (scores.logprobs_BT - frozen.old_logprobs_BT)
        for n in range(1, len(betas)):
            alive = torch.cat([mask[:, n:], torch.zeros(32, n, dtype=torch.bool)], 1)
            moved = scores.future_BTM[..., n - 1] - frozen.old_future_BTM[..., n - 1]
            log_ratios = log_ratios + betas[n] * torch.where(alive, moved, 0.0)
        ratios = log_ratios.exp()
        losses = -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
        policy.zero_grad()
        (losses[mask].sum() / mask.sum()).backward()
        expected = torch.cat(
            [weight.grad.flatten() for weight in policy.parts()["policy"]]
        ).double()
        tolerance = float(expected.abs().max()) * 1e-4
        torch.testing.assert_close(
            sums.mean_D, expected, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_on_policy_the_backbone_changes_first_tokens_only(frozen_path):
    """At rollout weights a block's gradient is the token level's, but for its first tokens (invariant 5)."""
    later = common.Frozen.load(frozen_path)
    frozen = common.Frozen(later.rollout, later.advantages_BT, later.logprobs_BT, later.logprobs_BT)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    settings = signal_to_noise.make_settings(frozen, [3], [0.4], 0.2)
    assert [s.name for s in settings] == ["token", "backbone, N=3, 40%", "sequence"], (
        "nothing clips, nothing to match"
    )
    sums = signal_to_noise.gradients(policy, frozen, settings)
    factors = torch.ones(frozen.mask_BT.shape[1])
    factors[:2] = torch.tensor([0.6, 0.8])

    def coefficients(log_ratios, advantage):
        return (
            -(log_ratios * factors[: len(log_ratios)]).sum() * advantage
        )  # d/dx exp(x) = 1 at x = 0

    expected = naive_gradients(policy, frozen, coefficients).mean(0)
    torch.testing.assert_close(
        sums[1].mean_D, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4
    )
    torch.testing.assert_close(
        sums[0].mean_D, sums[2].mean_D, rtol=1e-3, atol=float(sums[0].mean_D.abs().max()) * 1e-4
    )  # with token counts as weights the sequence's gradient is the token level's, too


def test_a_policy_that_was_not_frozen_is_refused(checkpoint, frozen_path, tmp_path):
    with pytest.raises(UserError, match="is not the policy of the frozen rollout"):
        signal_to_noise.main(
            ["--frozen", str(frozen_path), "--checkpoint", checkpoint, "--out", str(tmp_path)]
        )


def test_the_interval_of_a_ratio_needs_positive_signals():
    low, high = signal_to_noise.interval_of_ratio(2.0, [1.8, 2.2], 1.0, [0.9, 1.1])
    assert (low, high) == pytest.approx((2.0, 2.0)), "both move alike"
    low, high = signal_to_noise.interval_of_ratio(2.0, [1.0, 4.0], 1.0, [1.0, 1.0])
    assert low * high == pytest.approx(4.0)
    assert high == pytest.approx(2 * 4 ** (12.71 / 2))
    assert math.isnan(signal_to_noise.interval_of_ratio(2.0, [1.0, -0.1], 1.0, [1.0, 1.0])[0])


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
