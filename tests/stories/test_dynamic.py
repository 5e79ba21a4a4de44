"""Dynamic sampling through the whole loop: the groups of a rollout, its metrics and a resume."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import Throughput
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import Nucleus
from lightning_mpo.rewards import OverlongPenalty
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.seeding import Stream, generator_of
from tests.support.dynamic import Always, FewLow, train
from tests.support.runs import Digits, adam, make_objective, same

# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, Nucleus(0.9, 6)], ids=["full", "nucleus"])
def test_a_rollout_holds_the_first_useful_groups_of_its_rounds(tmp_path, support):
    """Against loops; prompts and random numbers are functions of (seed, rollout, rank, round) alone."""
    objective = make_objective(**({} if support is None else {"support": support}))
    run, watch = train(tmp_path, objective=objective, max_steps=8)
    data, kinds = run.trainer.datamodule, set()
    for counter, (event, drawn) in enumerate(watch.events):
        kept, dropped = [], []
        for round, (part, state) in enumerate(drawn):
            rows = data.training_rows(counter, 4, round)[: len(part.rows) // 4]
            assert list(part.rows[::4]) == rows
            stream, place = (
                (Stream.RESAMPLE, (counter, 0, round)) if round else (Stream.SAMPLE, (counter, 0))
            )
            assert torch.equal(state, generator_of(1, stream, *place).get_state())
            for start in range(0, len(part.texts), 4):
                texts = part.texts[start : start + 4]
                right = [
                    sum(c in "01234" for c in text) / max(len(text), 1) > 0.75 for text in texts
                ]
                (kept if 0 < sum(right) < 4 else dropped).append(texts)
        kept = kept[:4]
        missing = 4 - len(kept)
        assert missing == 0 or len(drawn) == 4, "rounds go on until the rollout is full"
        assert event.experience.rollout.texts == sum([*kept, *dropped[:missing]], ())
        assert event.experience.valid_B.tolist() == [True] * 4 * len(kept) + [False] * 4 * missing
        kinds.add((len(drawn) > 1, missing > 0))
    assert (True, False) in kinds, "no place was filled: the test shows nothing"


def test_metrics_say_what_was_thrown_away(tmp_path):
    run, watch = train(tmp_path, max_steps=4, callbacks=[Throughput()])
    tokens = 0
    for (_, line), (event, drawn) in zip(run.record.lines, watch.events, strict=True):
        rewards = [score_all([FewLow()], completions_of(part)).correct_B for part, _ in drawn]
        sums = torch.cat(rewards).view(-1, 4).sum(1)
        useful = int(((sums > 0) & (sums < 4)).sum())
        valid_B = event.experience.valid_B
        sampled = sum(int(part.response_mask_BT.sum()) for part, _ in drawn)
        trained = int(event.experience.rollout.response_mask_BT[valid_B].sum())
        tokens += sampled
        assert line["rollout/rounds"] == len(drawn)
        assert line["rollout/groups_dropped_right"] == int((sums == 4).sum())
        assert line["rollout/groups_dropped_wrong"] == int((sums == 0).sum())
        assert line["rollout/groups_missing"] == max(4 - useful, 0) == int((~valid_B).sum()) / 4
        assert line["rollout/groups_surplus"] == max(useful - 4, 0)
        assert line["rollout/tokens_dropped"] == sampled - trained
        assert line["rollout/accuracy_all"] == pytest.approx(
            torch.cat(rewards).float().mean().item()
        )
        assert line["reward/accuracy"] == pytest.approx(
            event.scores.correct_B.float().mean().item()
        )
        assert event.sampled_tokens == sampled
        assert event.accuracy == pytest.approx(line["rollout/accuracy_all"])
        assert line["throughput/rollout_tokens_per_s"] * line["time/rollout_s"] == pytest.approx(
            sampled
        )
    assert watch.tokens == tokens
    assert any(line["rollout/groups_dropped_wrong"] for _, line in run.record.lines)


def test_without_it_nothing_is_counted_and_where_all_groups_are_useful_it_changes_nothing(tmp_path):
    plain, _ = train(tmp_path, rounds=None, max_steps=2)
    assert not any(
        name.startswith("rollout/groups_dropped") for _, line in plain.record.lines for name in line
    )

    class Halves(Digits):
        is_accuracy = True

        def score(self, completions):
            return [float(b % 2) for b in range(len(completions))]

    runs = [train(tmp_path, [Halves()], rounds=rounds, max_steps=3)[0] for rounds in (None, 5)]
    assert same(runs[0].weights, runs[1].weights)
    assert runs[1].record.column("rollout/rounds") == [1, 1, 1]


def test_groups_are_judged_by_accuracy_and_not_by_the_reward(tmp_path):
    """A penalty on lengths tells rows apart that are all right; their groups are dropped all the same."""
    rewards = [Always(), OverlongPenalty(limit=8, buffer=8, weight=0.5)]
    run, watch = train(tmp_path, rewards, rounds=2, max_steps=1)
    event, drawn = watch.events[0]
    assert event.scores.rewards_B.view(4, 4).std(1).min() > 0
    assert len(drawn) == 2
    assert not event.experience.valid_B.any()
    assert run.record.lines[0][1]["rollout/groups_missing"] == 4


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [1, 4, 6], ids=lambda at: f"after{at}")
def test_a_run_goes_on_within_a_rollout_and_at_its_end(tmp_path, at):
    def run(folder, steps, ckpt_path=None):
        return train(
            folder,
            rounds=3,
            rollout={"minibatches": 2, "epochs": 2, "mask_truncated": True},
            objective=make_objective(
                support=Nucleus(0.9, 6), terms=[KLPenalty(AdaptiveCoefficient(target=0.01))]
            ),
            callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
            module={"optimizer": adam(3e-3)},
            accumulate_grad_batches=2,
            max_steps=steps,
            ckpt_path=ckpt_path,
        )[0]

    whole = run(tmp_path / "whole", 9)
    run(tmp_path, at)
    resumed = run(tmp_path, 9, f"{tmp_path}/last.ckpt")
    assert same(resumed.weights, whole.weights)
    assert resumed.record.without_clocks() == [
        line for line in whole.record.without_clocks() if line[0] >= at
    ]
    assert max(whole.record.column("rollout/rounds")) > 1
