"""A run that was killed anywhere goes on as if it had not been: weights and metrics bit for bit (docs/resume.md)."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import KLTracking
from lightning_mpo.errors import UserError
from lightning_mpo.modules.saved_state import mend_epoch_end
from lightning_mpo.objective.advantages import GeneralizedAdvantage
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.objective.terms import HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ParallelHeads, SeparateCritic, ValueHead
from tests.support.epochs import lines
from tests.support.runs import Probe, Run, adam, fit, make_objective, make_policy, same

UPDATES = 4  # of a rollout; 3 rollouts an epoch, so 12 updates an epoch
LAST = 14
PLAN = {"minibatches": 2, "epochs": 2}


def objective():
    return make_objective(
        support=TopK(6),
        actions=BlockActions(FutureShare(0.2), length=3),
        terms=[KLPenalty(AdaptiveCoefficient(target=0.01, coefficient=0.1, horizon=16))],
    )


def train(folder, steps, *, ckpt_path=None, callbacks=(), save=None, **options) -> Run:
    module = {
        "optimizer": adam(3e-3),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, LAST),
    }
    return fit(
        folder,
        **{"rollout": PLAN, "objective": objective(), "module": module} | options,
        accumulate_grad_batches=2,
        max_steps=steps,
        callbacks=[
            KLTracking(),
            *callbacks,
            save or ModelCheckpoint(dirpath=folder, save_last=True),
        ],
        ckpt_path=ckpt_path,
        gradient_clip_val=1.0,
    )


def assert_same(resumed: Run, whole: Run, at: int) -> None:
    assert same(resumed.weights, whole.weights)
    expected = {step: line for step, line in lines(whole).items() if step >= at}
    assert lines(resumed) == expected
    states = [run.trainer.optimizers[0].state_dict()["state"] for run in (resumed, whole)]
    for index, state in states[1].items():
        for name, value in state.items():
            assert torch.equal(states[0][index][name], value), name
    assert (
        resumed.trainer.optimizers[0].param_groups[0]["lr"]
        == whole.trainer.optimizers[0].param_groups[0]["lr"]
    )
    assert resumed.rollout.counter == whole.rollout.counter


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, str]:
    """An uninterrupted run that saved after each update."""
    folder = tmp_path_factory.mktemp("whole")
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return train(folder, LAST, save=save), str(folder)


@pytest.mark.parametrize("at", [1, 3, 4, 6, 12, 13], ids=lambda at: f"after{at}")
def test_from_a_checkpoint_of_any_update(tmp_path, whole, at):
    """In the middle of a rollout (1, 3, 6, 13), at its end (4) and at an epoch's (12)."""
    run, folder = whole
    assert_same(train(tmp_path, LAST, ckpt_path=f"{folder}/step={at}.ckpt"), run, at)


@pytest.mark.parametrize("at", [3, 4, 12, 13], ids=lambda at: f"after{at}")
@pytest.mark.parametrize("limit", [{}, {"max_epochs": 5}], ids=["steps", "epochs"])
def test_from_the_last_checkpoint_of_a_run_that_max_steps_stopped(tmp_path, whole, at, limit):
    """Saved in `on_train_epoch_end`, which Lightning alone resumes with one batch too many at a true epoch end."""
    train(tmp_path, at, **limit)
    ready = []
    probe = Probe(
        on_train_batch_start=lambda trainer, *_: ready.append(trainer.fit_loop.epoch_loop.batch_idx)
    )
    resumed = train(tmp_path, LAST, ckpt_path=f"{tmp_path}/last.ckpt", callbacks=[probe], **limit)
    assert_same(resumed, whole[0], at)
    assert ready[0] == 2 * at % 24
    assert len(ready) == 2 * (LAST - at)


@pytest.mark.parametrize("at", [3, 12], ids=lambda at: f"after{at}")
def test_from_a_checkpoint_of_the_very_end(tmp_path, whole, at):
    """`save_last` without any save before writes in `on_train_end`."""
    train(
        tmp_path,
        at,
        save=ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=100),
    )
    assert_same(train(tmp_path, LAST, ckpt_path=f"{tmp_path}/last.ckpt"), whole[0], at)


def test_a_resumed_epoch_counts_once(tmp_path):
    train(tmp_path, 5, max_epochs=2)
    resumed = train(tmp_path, -1, ckpt_path=f"{tmp_path}/last.ckpt", max_epochs=2)
    assert resumed.trainer.global_step == 24


def test_from_a_crash_in_the_middle_of_an_update(tmp_path, whole):
    def crash(trainer, module, batch, batch_idx):
        if batch_idx == 2 * 6 + 1:
            raise RuntimeError("power cut")

    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, LAST, save=save, callbacks=[Probe(on_train_batch_start=crash)])
    assert_same(train(tmp_path, LAST, ckpt_path=f"{tmp_path}/step=6.ckpt"), whole[0], 6)


@pytest.mark.parametrize("at", [5, 12], ids=lambda at: f"after{at}")
def test_from_a_checkpoint_that_validation_saved(tmp_path, at):
    options = {"val_check_interval": at, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    run = train(tmp_path / "whole", LAST, **options)
    train(tmp_path, at, **options)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == at
    resumed = train(tmp_path, LAST, ckpt_path=f"{tmp_path}/last.ckpt", **options)
    assert same(resumed.weights, run.weights)
    mine, expected = lines(resumed), {step: line for step, line in lines(run).items() if step >= at}
    assert mine == expected


def test_the_stored_rollout_is_used_and_not_a_new_one(tmp_path, whole):
    """A resume within a rollout must not sample before the rollout is spent."""
    counters = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, *_: counters.append(module.source.counter)
    )
    train(tmp_path, 9, ckpt_path=f"{whole[1]}/step=6.ckpt", callbacks=[probe])
    assert counters == [2] * 4 + [3] * 2


def test_the_kl_controller_goes_on_where_it_was(tmp_path, whole):
    state = torch.load(f"{whole[1]}/step=6.ckpt", weights_only=True)
    logged = whole[0].record.column("kl/coefficient")
    assert state["kl_coefficient"] == pytest.approx(logged[5], rel=1e-6) != 0.1
    resumed = train(tmp_path, 7, ckpt_path=f"{whole[1]}/step=6.ckpt")
    assert (
        resumed.module.objective.term(KLPenalty).controller.coefficient == state["kl_coefficient"]
    )


def test_the_command_lines_coefficient_is_the_start_only(tmp_path, whole):
    """Another run does not inherit the coefficient through the class: it moves once from 0.1, at a divergence of 0."""
    coefficient = (
        fit(tmp_path, objective=objective(), max_steps=1)
        .module.objective.term(KLPenalty)
        .controller.coefficient
    )
    assert coefficient == pytest.approx(0.08)


def test_checkpoints_load_without_pickled_code(whole):
    torch.load(f"{whole[1]}/step=6.ckpt", weights_only=True)


def test_another_number_of_processes_is_refused(tmp_path, whole):
    state = torch.load(f"{whole[1]}/step=6.ckpt", weights_only=True)
    key = next(key for key in state["callbacks"] if key.startswith("RolloutLoop"))
    state["callbacks"][key]["ranks"] *= 2
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(UserError, match="saved by 2 processes and cannot be resumed by 1"):
        train(tmp_path, LAST, ckpt_path=f"{tmp_path}/two.ckpt")


def test_mending_leaves_other_checkpoints_alone(whole):
    for step in (3, 12):
        state = torch.load(f"{whole[1]}/step={step}.ckpt", weights_only=True)
        loops = copy.deepcopy(state["loops"])
        mend_epoch_end(state)
        assert state["loops"] == loops
    mend_epoch_end({"state_dict": {}})


@pytest.mark.parametrize(
    "critic", [ValueHead, lambda: SeparateCritic(width=8)], ids=["head", "separate"]
)
def test_heads_and_a_critic_go_on_within_a_rollout_too(tmp_path, critic):
    """MPO on PPO: old log-probs of future offsets, values and returns are part of the stored rollout."""
    objective = make_objective(
        actions=BlockActions(FutureShare(0.2), length=3, source="mtp"),
        advantage=GeneralizedAdvantage(),
        terms=[
            KLPenalty(AdaptiveCoefficient(target=0.01), "k1", "reward"),
            HeadUpkeep(0.1),
            ValueLoss(),
        ],
    )

    def run(folder, steps, seed, **options):
        with torch.random.fork_rng():
            torch.manual_seed(
                seed
            )  # other heads and another critic to start from, and other random numbers on the way
            policy = make_policy(mtp=ParallelHeads(offsets=2), critic=critic())
            module = {"optimizer": adam(3e-3), "learning_rates": {"critic": 1e-2}}
            return train(
                folder, steps, objective=objective, policy=policy, module=module, **options
            )

    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole = run(tmp_path, 9, 11, save=save)
    assert whole.weights["critic.head.0.weight"].any()
    stored = torch.load(f"{tmp_path}/step=6.ckpt", weights_only=True)
    for at in (3, 4, 6):
        objective.term(KLPenalty).controller.coefficient = 0.1
        assert_same(
            run(tmp_path / str(at), 9, 12, ckpt_path=f"{tmp_path}/step={at}.ckpt"), whole, at
        )
    key = next(key for key in stored["callbacks"] if key.startswith("RolloutLoop"))
    experience = stored["callbacks"][key]["ranks"][0]["experience"]
    assert all(experience[name].any() for name in ("old_future_BTM", "values_BT", "returns_BT"))
    assert any(name.startswith("policy.critic.") for name in stored["state_dict"])


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(3)], ids=["full", "support"])
def test_candidates_go_on_within_a_rollout_too(tmp_path, support):
    """They are part of the stored rollout, with the -inf of slots that hold none."""
    axes = {"surrogate": DivergenceMask(delta=0.002, top_k=4), "support": support}

    def run(folder, steps, **options):
        return train(folder, steps, objective=make_objective(**axes), **options)

    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole = run(tmp_path, 9, save=save)
    assert sum(whole.record.column("ratio/clip_fraction")) > 0
    for at in (3, 6):
        assert_same(run(tmp_path / str(at), 9, ckpt_path=f"{tmp_path}/step={at}.ckpt"), whole, at)
    stored = torch.load(f"{tmp_path}/step=6.ckpt", weights_only=True)
    key = next(key for key in stored["callbacks"] if key.startswith("RolloutLoop"))
    logprobs = stored["callbacks"][key]["ranks"][0]["experience"]["rollout"][
        "candidate_logprobs_BTK"
    ]
    assert logprobs.shape[-1] == 5
    assert (logprobs == -torch.inf).any()
