"""PPO with a critic through the whole loop: what a rollout comes to, two learning rates, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k1
from lightning_mpo.modules import SupervisedWarmup
from lightning_mpo.objective.advantages import GeneralizedAdvantage
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import SeparateCritic, ValueHead
from tests.support.runs import (
    Digits,
    Probe,
    Run,
    adam,
    fit,
    make_data,
    make_objective,
    make_policy,
    make_trainer,
    same,
)

CRITICS = {
    "head": ValueHead,
    "detached": lambda: ValueHead(detach_trunk=True),
    "separate": SeparateCritic,
}
each_critic = pytest.mark.parametrize("kind", CRITICS)


def ppo(critic: ValueLoss | None = None, *, whiten: bool = True, terms=(), **axes):
    advantage = GeneralizedAdvantage(gamma=0.99, lam=0.9, whiten=whiten)
    return make_objective(advantage=advantage, terms=[*terms, critic or ValueLoss()], **axes)


def train(folder: Path, kind: str = "head", *, objective=None, rollout=None, **options) -> Run:
    torch.manual_seed(3)  # of a hidden layer, where there is one
    plan = {"prompts": 12, "completions": 1} | (rollout or {})
    return fit(
        folder,
        policy=make_policy(critic=CRITICS[kind]()),
        objective=objective or ppo(),
        rollout=plan,
        **options,
    )


def plain(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class SomeDigits(Digits):
    """Judges no completion that begins with a digit from 7 on."""

    def score(self, completions):
        return [
            None if done.text[:1] in "789" else s
            for done, s in zip(completions, super().score(completions), strict=True)
        ]


# --- the experience ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened", "raw"])
def test_a_rollout_comes_to_advantages_and_returns_from_the_values_of_its_own_policy(
    tmp_path, whiten
):
    """Against loops over tokens: KL in each token's reward, the estimator, and the mean and deviation of all tokens."""
    seen = []

    def look(trainer, module, batch, batch_idx):
        rollout = module.source.experience.rollout
        seen.append((module.source.experience, module.score(rollout, request=module.objective.request),
                     module.score(rollout, reference=True).logprobs_BT))  # fmt: skip

    kl = KLPenalty(ConstantCoefficient(0.3), "k1", "reward")
    run = train(
        tmp_path, objective=ppo(whiten=whiten, terms=[kl]), rollout={"rewards": [SomeDigits()], "prompts": 24}, max_steps=3,
        callbacks=[Probe(on_train_batch_start=look)], module={"optimizer": adam(3e-2)}, data=make_data(train_problems=24),
    )  # fmt: skip
    assert run.trainer.global_step == 3
    for step, (experience, scores, reference_BT) in enumerate(seen):
        mask_BT, valid_B = experience.rollout.response_mask_BT, experience.valid_B
        assert 0 < valid_B.sum() < len(valid_B)
        torch.testing.assert_close(experience.values_BT, scores.values_BT)
        assert experience.values_BT.any() == (step > 0)
        judged_B = torch.tensor(
            [d or 0.0 for d in SomeDigits().score(list(map(Said, experience.rollout.texts)))]
        )
        penalty_BT = 0.3 * k1(scores.logprobs_BT, reference_BT)
        assert (step == 0) == (penalty_BT.abs().max() < 1e-6)
        raw_BT = torch.zeros(mask_BT.shape)
        for b in valid_B.nonzero()[:, 0].tolist():
            ahead = after = 0.0
            length = int(mask_BT[b].sum())
            for t in reversed(range(length)):
                reward = (judged_B[b].item() if t == length - 1 else 0.0) - penalty_BT[b, t].item()
                value = experience.values_BT[b, t].item()
                ahead = reward + 0.99 * after - value + 0.99 * 0.9 * ahead
                after = value
                raw_BT[b, t] = ahead
                assert experience.returns_BT[b, t].item() == pytest.approx(ahead + value, abs=1e-5)
        counted_BT = mask_BT & valid_B[:, None]
        values = raw_BT[counted_BT]
        expected = (values - values.mean()) / values.std() if whiten else values
        torch.testing.assert_close(
            experience.advantages_BT[counted_BT], expected, rtol=1e-3, atol=1e-4
        )
        assert not experience.advantages_BT[~counted_BT].any()


class Said:
    """What `Digits` reads of a completion."""

    def __init__(self, text: str) -> None:
        self.text = text


# --- two learning rates -----------------------------------------------------------------------------------------------


def moved(run: Run, start: Run, part: str) -> float:
    names = [name for name in start.weights if name.startswith("critic.") == (part == "critic")]
    return (
        torch.stack([(run.weights[name] - start.weights[name]).norm() for name in names])
        .norm()
        .item()
    )


@each_critic
def test_each_part_steps_with_its_own_rate_and_logs_its_own_norm(tmp_path, kind):
    start = train(tmp_path, kind, max_steps=1, module={"optimizer": plain(0.0)})
    run = train(
        tmp_path,
        kind,
        max_steps=1,
        module={"optimizer": plain(0.1), "learning_rates": {"critic": 0.5}},
    )
    norms = {
        part: run.record.column(f"optim/grad_norm{suffix}")[0]
        for part, suffix in (("policy", ""), ("critic", "_critic"))
    }
    assert norms["policy"] > 0.01
    assert norms["critic"] > 0.01
    assert moved(run, start, "policy") == pytest.approx(0.1 * norms["policy"], rel=1e-4)
    assert moved(run, start, "critic") == pytest.approx(0.5 * norms["critic"], rel=1e-4)


def test_a_huge_gradient_of_the_critic_is_clipped_apart(tmp_path):
    """Clipped together, the policy would hardly move."""
    objective = ppo(ValueLoss(coef=1e6, clip=None))
    options = {
        "kind": "detached",
        "objective": objective,
        "max_steps": 1,
        "gradient_clip_val": 0.01,
    }
    start = train(tmp_path, **options, module={"optimizer": plain(0.0)})
    run = train(tmp_path, **options, module={"optimizer": plain(1.0)})
    assert run.record.column("optim/grad_norm_critic")[0] > 1e4
    assert moved(run, start, "policy") == pytest.approx(0.01, rel=1e-4)
    assert moved(run, start, "critic") == pytest.approx(0.01, rel=1e-4)


def test_a_scheduler_that_overrides_a_parts_rate_is_refused(tmp_path):
    def options(max_lr):
        return {
            "optimizer": plain(0.1),
            "learning_rates": {"critic": 0.5},
            "scheduler": lambda optimizer: OneCycleLR(
                optimizer, max_lr, total_steps=4, cycle_momentum=False
            ),
        }

    message = r"`max_lr` \(0.1\) replaces `learning_rates.critic` \(0.5\); give `max_lr` as a list .* policy, critic$"
    with pytest.raises(UserError, match=message):
        train(tmp_path, max_steps=1, module=options(0.1))
    rates = []
    probe = Probe(
        on_train_batch_start=lambda trainer, *_: rates.append(
            [g["lr"] for g in trainer.optimizers[0].param_groups]
        )
    )
    train(tmp_path, max_steps=3, module=options([0.1, 0.5]), callbacks=[probe])
    for policy, critic in rates:
        assert critic == pytest.approx(5 * policy)
    assert len({policy for policy, _ in rates}) == 3


# --- what is trained --------------------------------------------------------------------------------------------------


@each_critic
def test_a_critic_that_the_objective_does_not_use_is_frozen(tmp_path, kind):
    used = train(tmp_path, kind, max_steps=1)
    idle = train(
        tmp_path, kind, objective=make_objective(), rollout={"completions": 4}, max_steps=2
    )
    assert idle.module.policy.critic is not None
    assert "critic" not in idle.module.policy.parts()
    assert len(used.trainer.optimizers[0].param_groups) == 2
    assert len(idle.trainer.optimizers[0].param_groups) == 1
    assert not any(weight.grad is not None for weight in idle.module.policy.critic.parameters())
    assert not idle.record.column("optim/grad_norm_critic")
    assert not idle.record.column("value/error")


def test_a_warm_up_leaves_the_critic_alone(tmp_path):
    module = SupervisedWarmup(make_policy(critic=SeparateCritic()), batches_per_epoch=2)
    make_trainer(tmp_path, [], max_steps=2).fit(module, datamodule=make_data())
    assert list(module.policy.parts()) == ["policy"]
    assert not any(weight.grad is not None for weight in module.policy.critic.parameters())


def test_an_objective_with_a_critic_needs_one_in_the_policy(tmp_path):
    with pytest.raises(UserError, match="`ValueLoss` needs `policy.critic`: give `ValueHead`, say"):
        fit(tmp_path, objective=ppo(), max_steps=1)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_critic_learns_to_foresee_the_returns_of_a_policy_that_stands_still(tmp_path):
    run = train(
        tmp_path, "separate", objective=ppo(ValueLoss(coef=1.0, clip=None)), rollout={"prompts": 96, "epochs": 2},
        max_steps=60, module={"optimizer": adam(0.0), "learning_rates": {"critic": 3e-3}}, data=make_data(train_problems=24),
    )  # fmt: skip
    explained = run.record.column("value/explained_variance")[
        ::2
    ]  # of rollouts that the critic has not seen
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert sum(explained[-5:]) / 5 > 0.2, explained


def learn(folder, kind: str, lr: float, seed: int, max_steps: int = 60) -> Run:
    return train(
        folder, kind, rollout={"prompts": 24, "epochs": 2, "minibatches": 2, "seed": seed}, max_steps=max_steps,
        module={"optimizer": adam(lr), "learning_rates": {"critic": 3 * lr}}, gradient_clip_val=1.0,
        data=make_data(train_problems=24),
    )  # fmt: skip


@each_critic
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_reward_rises_with_one_completion_per_prompt(tmp_path, kind, seed):
    curve = learn(tmp_path, kind, 1e-3, seed).record.column("reward/mean")[::4]
    assert curve[0] < 0.45
    assert sum(curve[-3:]) / 3 - sum(curve[:3]) / 3 > 0.3, curve


def test_without_a_learning_rate_it_cannot(tmp_path):
    """The weights stay bit for bit; with one they do not."""
    begun = learn(tmp_path, "separate", 0.0, 1, max_steps=0).weights
    for lr in (0.0, 1e-3):
        assert same(begun, learn(tmp_path, "separate", lr, 1, max_steps=4).weights) == (lr == 0)
