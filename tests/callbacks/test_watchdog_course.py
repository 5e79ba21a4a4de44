"""The watchdog over the course of a run: real runs that go wrong, sentences told once, and the same after a resume."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import KLTracking, Watchdog
from lightning_mpo.data.arithmetic import Arithmetic
from lightning_mpo.metrics import WatchdogLimits
from lightning_mpo.rewards.text import ExactAnswer
from lightning_mpo.sampling import LocalSampler
from tests.support.figures import course, feed
from tests.support.runs import Digits, Probe, adam, fit


class Ones(Digits):
    """The share of ones: a policy that learns it writes nothing else."""

    def score(self, completions):
        return [done.text.count("1") / 24 for done in completions]


class Others(Digits):
    """The opposite, measured only."""

    def score(self, completions):
        return [1 - done.text.count("1") / 24 for done in completions]


class Right(Digits):
    is_accuracy = True

    def score(self, completions):
        return [1.0] * len(completions)


def sentences(caught) -> list[str]:
    return [str(w.message) for w in caught if w.filename.endswith("watchdog.py")]


def run(tmp_path, *callbacks, watchdog=None, **options) -> list[str]:
    """Return the watchdog's sentences in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callbacks=[watchdog or Watchdog(), *callbacks], **options)
    return sentences(caught)


def test_loops_and_a_hacked_reward(tmp_path):
    found = run(
        tmp_path,
        rollout={"rewards": [Ones(), Others(weight=0.0)], "max_new_tokens": 24},
        module={"optimizer": adam(1e-2)},
        max_steps=30,
    )
    loops = [s for s in found if "the policy runs into loops; look into `completions/`" in s]
    hacked = [s for s in found if "while `reward/others` fell from" in s]
    assert [len(loops), len(hacked)] == [1, 1], found


def test_a_step_that_goes_too_far(tmp_path):
    def jump(trainer, *_):
        if trainer.global_step == 6:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.1

    found = run(
        tmp_path, KLTracking(), Probe(on_train_batch_start=jump), module={"optimizer": adam(1e-6)}, max_steps=10
    )  # fmt: skip
    assert sum("the divergence from the reference jumped from" in s for s in found) == 1, found


def test_a_learning_rate_of_zero(tmp_path):
    options = {
        "module": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)}
    }  # fmt: skip
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    sentence = (
        "the learning rate was 0 in the last 3 rollouts, so nothing is learnt: check the steps of `model.scheduler` "
        "against `trainer.max_steps`"
    )
    assert run(tmp_path, save, **options) == [sentence]
    # the resumed run has been told
    resumed = Watchdog()
    assert run(
        tmp_path, watchdog=resumed, ckpt_path=str(tmp_path / "step=4.ckpt"), max_steps=6, **options
    ) == []  # fmt: skip
    assert resumed._idle_rate == 6


def test_a_sampler_with_other_weights(tmp_path, monkeypatch):
    sample = LocalSampler.sample

    def other(self, *args, **options):
        rollout = sample(self, *args, **options)
        return replace(rollout, behaviour_logprobs_BT=rollout.behaviour_logprobs_BT - 0.2)

    monkeypatch.setattr(LocalSampler, "sample", other)
    rollout = {"epochs": 2, "parity_gate": False}
    (found,) = run(tmp_path, rollout=rollout)
    assert found == (
        "sampler and trainer differ by 0.2 nats a token in the mean: the sampler has other weights or another precision "
        "than the trainer; check `rollout.sampler` and `trainer.precision`, or set `objective.correction`"
    )
    assert run(tmp_path, rollout=rollout, watchdog=Watchdog(sampler_tolerance=0.3)) == []
    assert run(tmp_path, rollout={"parity_gate": False}) == []  # nothing to compare with


def test_answers_that_are_never_right(tmp_path):
    """Answers are read, and the target has a unit that they lack."""
    (found,) = run(
        tmp_path, rollout={"rewards": [ExactAnswer()]}, data=Arithmetic(digits=3), max_steps=2
    )
    assert (
        "no completion of the last 2 rollouts is right (all have a reward of about 0), although answers"
        in found
    )


@pytest.mark.parametrize(("steps", "count"), [(4, 0), (5, 1)])
def test_solved_data_are_told_late(tmp_path, steps, count):
    found = run(tmp_path, rollout={"rewards": [Right()]}, watchdog=Watchdog(1), max_steps=steps)
    assert found == count * [
        "all completions of the last 5 rollouts are right, so nothing is learnt: the data are solved; end the run, or "
        "take harder rows in `data`"
    ]


# --- figures that are fed ------------------------------------------------------------------------

WRONG = course(
    policy__entropy=[0.5, 0.2, 0.05, 0.05, 0.05, 0.05],
    rollout__length=[80, 40, 20, 20, 20, 20],
    rollout__repetition=0.8,
    reward__answered=[0.9, 0.3, 0.2, 0.2, 0.2, 0.2],
    reward__mean=[0.5, 0.4, 0.4, 0.4, 0.4, 0.4],
    reward__other=[0.9, 0.9, 0.9, 0.6, 0.6, 0.6],
    val__pass_at_1=[0.5, 0.5, 0.2, 0.2, 0.2, 0.2],
    kl__rollout_mean=[0.01, 0.02, 0.03, 0.9, 0.8, 0.7],
)


def fed(rollouts, watchdog=None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feed(watchdog or Watchdog(), rollouts)
    return sentences(caught)


def test_each_sentence_is_told_once():
    found = fed(WRONG * 3)
    assert len(found) == len(set(found))
    assert len(found) >= 5
    assert fed([*course(), *course()]) == []


@pytest.mark.parametrize("at", range(1, len(WRONG)))
def test_a_resume_tells_what_the_whole_run_would_have_told(at):
    """The state goes through a checkpoint, read as data."""
    whole, first, second = Watchdog(), Watchdog(), Watchdog()
    expected, file = fed(WRONG, whole), io.BytesIO()
    before = fed(WRONG[:at], first)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert before + fed(WRONG[at:], second) == expected
    assert second.state_dict() == whole.state_dict()


def test_a_checkpoint_of_an_earlier_version_begins_afresh():
    watchdog = Watchdog()
    watchdog.load_state_dict({"flat": 1, "raised": ["flat"]})
    assert watchdog.state_dict()["raised"] == ["flat"]
    assert watchdog.trends.first == []


def test_rollouts_that_no_reward_judged_are_left_out():
    unjudged = [figures | {"reward/judged": 0.0, "reward/mean": 0.0} for figures in course()]
    watchdog = Watchdog()
    assert fed([*course(), *unjudged], watchdog) == []
    assert len(watchdog.trends.last) == 6


def test_limits_are_options():
    rollouts = course(policy__entropy=0.15)
    assert fed(rollouts) == []
    (found,) = fed(rollouts, Watchdog(limits=WatchdogLimits(entropy_share=0.2)))
    assert found.startswith("the entropy of the policy fell from 1 to 0.15 nats a token")
