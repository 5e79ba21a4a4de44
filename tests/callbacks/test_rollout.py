"""The rollout callback beyond training (whose loop `tests/stories` covers): verbs, seeds, refusals."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rewards.text import ExactAnswer
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from tests.support.runs import (
    Digits,
    fit,
    make_data,
    make_objective,
    make_policy,
    make_trainer,
    same,
)


class Below5(Digits):
    """Right where half of the characters are digits below 5."""

    is_accuracy = True


def stage(folder, verb, *, completions=3, seed=8, objective=None, data=None, **trainer):
    """Run `validate`, `test` or `predict` and return its result with all that was used."""
    rollout = RolloutLoop(
        [Below5()],
        max_new_tokens=6,
        prompts=4,
        completions=4,
        seed=seed,
        validation_completions=completions,
    )
    module = PolicyOptimization(make_policy(), objective or make_objective(), temperature=0.7)
    data = data or make_data(validation_batch_size=3)
    options = {"limit_val_batches": 1.0, "limit_test_batches": 1.0} | trainer
    machine = make_trainer(folder, [rollout], **options)
    return getattr(machine, verb)(module, datamodule=data), module, rollout, data


def draw(module, rollout, data, completions, seed=8):
    """Sample held-out prompts as validation says it does."""
    rollouts = []
    for start in range(0, 4, 3):
        rollouts.append(
            rollout.sampler.sample(
                module.policy,
                data.encode(list(data.splits.validation)[start : start + 3]),
                completions,
                SamplingRequest(FullVocabulary(), 0.7, 6),
                generator=generator_of(seed, Stream.EVALUATE, start),
            )
        )
    return rollouts


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_held_out_prompts_are_sampled_from_the_full_vocabulary(tmp_path, verb):
    """Whatever support is trained: pass@1, reward, length and truncation against a recomputation."""
    (result,), module, rollout, data = stage(
        tmp_path, verb, objective=make_objective(support=TopK(2))
    )
    parts = draw(module, rollout, data, 3)
    scores = [score_all(rollout.rewards, completions_of(part)) for part in parts]
    correct = torch.cat([score.correct_B for score in scores]).float()
    assert 0 < correct.mean() < 1
    assert result["val/pass_at_1"] == pytest.approx(correct.mean().item())
    assert result["val/reward"] == pytest.approx(
        torch.cat([score.rewards_B for score in scores]).mean().item()
    )
    assert result["val/pass_at_1_low"] < result["val/pass_at_1"] < result["val/pass_at_1_high"]
    assert result["val/answered"] == result["val/judged"] == 1
    lengths = torch.cat([part.response_mask_BT.sum(1).float() for part in parts])
    assert result["val/length"] == pytest.approx(lengths.mean().item())
    assert result["val/truncated"] == pytest.approx(
        torch.cat([part.finish_B for part in parts]).float().mean().item()
    )


def test_predict_returns_a_record_per_completion(tmp_path):
    batches, module, rollout, data = stage(tmp_path, "predict", completions=2)
    records = [record for batch in batches for record in batch]
    texts = [text for part in draw(module, rollout, data, 2) for text in part.texts]
    assert [record["completion"] for record in records] == texts
    assert [record["prompt"] for record in records] == [
        row.prompt for row in data.splits.validation for _ in range(2)
    ]
    assert records[0]["target"] == data.splits.validation[0].target
    assert records[0]["reward"] == pytest.approx(
        Digits().score(completions_of(draw(module, rollout, data, 2)[0]))[0]
    )


def test_validation_prompts_limits_the_rows(tmp_path):
    batches, *_ = stage(tmp_path, "predict", completions=2, data=make_data(validation_prompts=2))
    assert len([record for batch in batches for record in batch]) == 4


def test_the_seed_is_seed_everything_unless_given(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert RolloutLoop().seed == 41
    assert RolloutLoop(seed=5).seed == 5
    assert RolloutLoop(seed=0).seed == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert RolloutLoop().seed == 0


def test_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    first, again = (fit(tmp_path, max_steps=2) for _ in range(2))
    assert same(first.weights, again.weights)
    assert first.record.lines == again.record.lines
    assert not same(first.weights, fit(tmp_path, max_steps=2, rollout={"seed": 2}).weights)


def test_others_are_told_of_a_rollout_and_of_its_tokens(tmp_path):
    said = []

    class Listener(RolloutCallback):
        def on_rollout_start(self, trainer, module, sequences, limit):
            said.append(("start", sequences, limit))

        def on_rollout_tokens(self, tokens, running):
            said.append(("tokens", tokens, running))

        def on_rollout_end(self, trainer, module, event):
            said.append(("end", event.counter, event.tokens))
            self.event = event

    listener = Listener()
    fit(tmp_path, callbacks=[listener], max_steps=2)
    assert said[0] == ("start", 16, 8)
    ends = [i for i, line in enumerate(said) if line[0] == "end"]
    assert [said[i][1] for i in ends] == [0, 1]
    tokens = said[1 : ends[0]]
    assert sum(line[1] for line in tokens) == said[ends[0]][2], "each token is reported once"
    assert [line[2] for line in tokens] == sorted((line[2] for line in tokens), reverse=True)
    event = listener.event
    assert event.sample_seconds > 0
    assert event.prepare_seconds > 0
    assert torch.equal(event.experience.rewards_B, event.scores.rewards_B.float())


def test_rewards_are_summed_by_weight(tmp_path):
    run = fit(
        tmp_path, rollout={"rewards": [Digits(weight=0.5), ExactAnswer(weight=3.0)]}, max_steps=1
    )
    line = run.record.lines[0][1]
    assert line["reward/mean"] == pytest.approx(
        0.5 * line["reward/digits"] + 3 * line["reward/exact_answer"], rel=1e-5
    )


def test_another_data_module_is_refused(tmp_path):
    with pytest.raises(UserError, match="PromptDataModule"):
        fit(tmp_path, data=L.LightningDataModule())


def test_other_modules_are_left_alone(tmp_path):
    from lightning_mpo.modules import SupervisedWarmup

    module = SupervisedWarmup(make_policy(), batches_per_epoch=1)
    make_trainer(tmp_path, [RolloutLoop()], max_steps=1).fit(module, datamodule=make_data())
