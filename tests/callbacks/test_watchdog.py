"""The watchdog: five causes, one sentence each, once; silence where all is well."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_mpo.callbacks import Watchdog
from lightning_mpo.errors import UserError
from lightning_mpo.objective.advantages import GeneralizedAdvantage
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ValueHead
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.rewards.text import ExactAnswer
from tests.support.runs import Digits, Probe, adam, fit, make_objective, make_policy


class Flat(Digits):
    def score(self, completions):
        return [0.25] * len(completions)


class Mute(Digits):
    def answered(self, completions):
        return [False] * len(completions)


def said(tmp_path, rewards, *, steps=4, watchdog=None, callbacks=(), **options) -> list[str]:
    """Return the watchdog's sentences in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout = {"rewards": rewards, "max_new_tokens": 24} | options.pop("rollout", {})
        fit(
            tmp_path,
            rollout=rollout,
            callbacks=[watchdog or Watchdog(), *callbacks],
            max_steps=steps,
            **options,
        )
    words = (
        "so nothing is learnt",
        "were cut off",
        "no answer could be parsed",
        "ratios off 1",
        "no reward (each",
        "`rollout.rewards` cancel",
    )
    return [str(w.message) for w in caught if any(word in str(w.message) for word in words)]


def test_it_is_silent_when_all_is_well(tmp_path):
    assert (
        said(tmp_path, [Digits()], rollout={"epochs": 2}, steps=6, module={"optimizer": adam(1e-2)})
        == []
    )


def test_no_reward_variance(tmp_path):
    (sentence,) = said(tmp_path, [Flat()])
    assert sentence == (
        "no prompt of the last 2 rollouts has completions of different reward (all about 0.25), so nothing is learnt: "
        "change the difficulty of `data`, raise `rollout.completions`, or give a graded reward"
    )


@pytest.mark.parametrize(
    ("reward", "sentences"), [(Flat(), 1), (Digits(), 0)], ids=["flat", "graded"]
)
def test_no_reward_variance_with_a_critic(tmp_path, reward, sentences):
    """Advantages are never 0 then: whitening blows the critic's errors up."""
    found = said(
        tmp_path, [reward], rollout={"prompts": 12, "completions": 1}, policy=make_policy(critic=ValueHead()),
        objective=make_objective(advantage=GeneralizedAdvantage(), terms=[ValueLoss()]),
    )  # fmt: skip
    assert found == sentences * [
        "all completions of the last 2 rollouts have the reward 0.25, so nothing is learnt except from errors of the critic: "
        "change the difficulty of `data`, or give a graded reward"
    ]


@pytest.mark.parametrize(("patience", "steps", "sentences"), [(3, 2, 0), (3, 3, 1), (1, 1, 1)])
def test_no_reward_variance_waits_for_its_patience(tmp_path, patience, steps, sentences):
    assert len(said(tmp_path, [Flat()], steps=steps, watchdog=Watchdog(patience))) == sentences


def test_everything_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(CausalPolicy, "end_tokens", [99])
    (sentence,) = said(tmp_path, [Digits()], rollout={"max_new_tokens": 5})
    assert sentence == (
        "all 16 completions were cut off at 5 tokens: raise `rollout.max_new_tokens`, or check that the end token is "
        "among those the policy may sample"
    )


def test_no_answer_parsed(tmp_path):
    (sentence,) = said(tmp_path, [Mute()])
    assert sentence == (
        "no answer could be parsed from any of the 16 completions: say in `data.instruction` how an answer is to be "
        "written, or choose another reward"
    )


def test_what_nobody_judged_is_no_matter_of_difficulty(tmp_path):
    class Silent(Digits):
        def score(self, completions):
            return [None] * len(completions)

    (sentence,) = said(tmp_path, [Silent()])
    assert sentence == (
        "16 of 16 completions were judged by no reward (each returned None), and so nothing is learnt: give "
        "`rollout.rewards` one that judges these rows, or take them out of `data`"
    )


def test_one_judged_completion_a_prompt_leaves_nothing_to_compare(tmp_path):
    class One(Digits):
        def score(self, completions):
            return [float(i) if i % 4 == 0 else None for i in range(len(completions))]

    sentences = said(tmp_path, [One()])
    assert [s.split(",")[0] for s in sentences] == [
        "12 of 16 completions were judged by no reward (each returned None)",
        "no prompt of the last 2 rollouts has two completions that a reward judged",
    ]


def test_weights_that_cancel_are_named(tmp_path):
    (sentence,) = said(tmp_path, [Digits(weight=1.0), Digits(weight=-1.0)])
    assert (
        "although `digits`, `digits_2` tells them apart: the weights of `rollout.rewards` cancel"
        in sentence
    )


def test_rewards_that_are_equal_in_float32_alone_are_learnt_from(tmp_path):
    class Far(Digits):
        def score(self, completions):
            return [-1e9 + score for score in super().score(completions)]

    assert said(tmp_path, [Far()]) == []


def test_one_parsed_answer_is_enough(tmp_path):
    class Once(Digits):
        def answered(self, completions):
            return [i == 3 for i in range(len(completions))]

    assert said(tmp_path, [Once()]) == []


def test_wrong_answers_are_not_unparsed_ones(tmp_path):
    sentences = said(tmp_path, [ExactAnswer(separator="3")], steps=1, watchdog=Watchdog(patience=9))
    assert sentences == []


def test_ratio_off_one_in_the_first_update_of_a_rollout(tmp_path, monkeypatch):
    """A scoring pass that differs from the training pass, as dropout would make it."""
    score = CausalPolicy.score

    def other(self, rollout, mask_BT, **options):
        scores = score(self, rollout, mask_BT, **options)
        noise = 0.0 if torch.is_grad_enabled() else 0.2
        return type(scores)(
            torch.where(mask_BT, scores.logprobs_BT - noise, 0.0), scores.entropy_BT
        )

    monkeypatch.setattr(CausalPolicy, "score", other)
    rollout = {"epochs": 2, "parity_gate": False}
    (sentence,) = said(tmp_path, [Digits()], rollout=rollout, accumulate_grad_batches=2)
    assert sentence == (
        "the first update of a rollout has ratios off 1 (mean |log ratio| 0.2 nats): the scoring pass differs from the "
        "training pass; set dropout to 0 (`policy.lora.dropout`) and one `trainer.precision`"
    )
    assert said(tmp_path, [Digits()], rollout=rollout, watchdog=Watchdog(ratio_tolerance=0.3)) == []


def test_a_gradient_of_nan_stops_the_run_and_names_the_weight(tmp_path):
    def spoil(trainer, module, *_):
        if trainer.global_step == 1:
            next(module.policy.parameters()).grad[0, 0] = torch.nan

    with pytest.raises(
        UserError,
        match=r"the gradient of `policy.network.model.embed_tokens.weight` is not finite at update 1; nothing was changed:"
        r" lower the learning rate, set `trainer.gradient_clip_val`, or look at the rewards in `completions/`",
    ):
        said(tmp_path, [Digits()], callbacks=[Probe(on_after_backward=spoil)])


def test_it_speaks_again_once_the_cause_had_gone(tmp_path):
    class Sometimes(Mute):
        calls = 0

        def answered(self, completions):
            type(self).calls += 1
            return [self.calls == 3] * len(completions)

    assert len(said(tmp_path, [Sometimes()], steps=5)) == 2


def test_patience_is_positive():
    with pytest.raises(UserError, match="patience"):
        Watchdog(patience=0)
