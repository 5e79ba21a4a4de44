"""A resumed run has the reference where it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_mpo.callbacks import ExactResume, ReferenceUpdate
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy
from tests.support.references import LORA, _saving, reference_of, run
from tests.support.runs import Run, make_data, make_objective, make_policy, make_trainer, same


def train(folder, policy, *, update=None, ckpt_path=None, **options) -> Run:
    """Five rollouts of two updates each; the reference moves before the third and the fifth."""
    update = update or ReferenceUpdate(every=2, mixup=0.5)
    objective = make_objective(
        support=TopK(6, from_reference=True), terms=[KLPenalty(ConstantCoefficient(0.2))]
    )
    return run(
        folder, policy, update, updates=9, callbacks=[ExactResume(), _saving(folder)], objective=objective,
        rollout={"minibatches": 2}, ckpt_path=ckpt_path, **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["copy", "lora"])
def whole(request, tmp_path_factory, tiny_folder):
    """An undisturbed run, its folder and a maker of its policy."""
    make = make_policy if request.param == "copy" else lambda: CausalPolicy(tiny_folder, lora=LORA)
    folder = tmp_path_factory.mktemp(request.param)
    return train(folder, make()), folder, make


@pytest.mark.parametrize("at", [2, 4, 5, 7, 8], ids=lambda at: f"after{at}")
def test_a_run_goes_on_as_if_undisturbed(tmp_path, whole, at):
    """Before the reference moved (2), right before it moves (4, 8), within the rollout it moved for (5), after that (7)."""
    done, folder, make = whole
    again = train(tmp_path, make(), ckpt_path=f"{folder}/step={at}.ckpt")
    assert same(again.weights, done.weights)
    assert same(reference_of(again), reference_of(done))
    expected, found = (
        [line for line in one.record.without_clocks() if line[0] >= at] for one in (done, again)
    )
    assert expected
    assert found == expected


def test_a_checkpoint_holds_the_reference_once_it_moved(whole):
    done, folder, _ = whole
    states = [
        torch.load(folder / f"step={at}.ckpt", weights_only=True)["callbacks"] for at in (4, 5, 9)
    ]
    assert "ReferenceUpdate" not in states[0]
    assert [state["ReferenceUpdate"]["counter"] for state in states[1:]] == [2, 4]
    assert same(states[2]["ReferenceUpdate"]["reference"], reference_of(done))
    if done.module.policy.lora is not None:
        assert all("lora_" in name for name in states[2]["ReferenceUpdate"]["reference"])


def test_a_validation_has_the_reference_of_the_checkpoint(tmp_path, whole):
    done, folder, make = whole
    update = ReferenceUpdate(every=2, mixup=0.5)
    objective = make_objective(support=TopK(6, from_reference=True))
    module = PolicyOptimization(make(), objective)
    trainer = make_trainer(tmp_path, [update, done.rollout], limit_val_batches=1)
    trainer.validate(
        module, datamodule=make_data(), ckpt_path=f"{folder}/step=9.ckpt", verbose=False
    )
    assert same(module.policy.reference.state(), reference_of(done))


def test_a_rollout_that_begins_twice_moves_the_reference_once(tmp_path):
    """A save in the middle of a rollout, of an exception say, lets the same rollout begin again."""
    update = ReferenceUpdate(every=2, mixup=0.5)
    done = run(tmp_path, make_policy(), update, updates=3)
    before = reference_of(done)
    source = SimpleNamespace(counter=2)
    update.on_rollout_start(done.trainer, SimpleNamespace(source=source), 1, 1)
    assert same(before, reference_of(done))
    source.counter = 4
    update.on_rollout_start(done.trainer, SimpleNamespace(source=source), 1, 1)
    assert not same(before, reference_of(done))


def test_nor_does_a_rollout_that_begins_again_after_a_resume(tmp_path, whole):
    done, folder, make = whole
    update = ReferenceUpdate(every=2, mixup=0.5)
    module = PolicyOptimization(make(), make_objective(terms=[KLPenalty(ConstantCoefficient(0.2))]))
    module.policy.build(device=torch.device("cpu"), reference=True)
    update.setup(SimpleNamespace(callbacks=[], strategy=None), module, "fit")
    update.load_state_dict(
        torch.load(folder / "step=9.ckpt", weights_only=True)["callbacks"]["ReferenceUpdate"]
    )
    for counter, moved in ((4, False), (6, True)):
        update.on_rollout_start(
            done.trainer, SimpleNamespace(source=SimpleNamespace(counter=counter)), 1, 1
        )
        assert same(module.policy.reference.state(), reference_of(done)) != moved


def test_other_options_are_said(tmp_path, whole, caplog):
    _, folder, make = whole
    with caplog.at_level("INFO"):
        train(tmp_path, make(), update=ReferenceUpdate(every=3), ckpt_path=f"{folder}/step=8.ckpt")
    assert "ReferenceUpdate.every was 2 and is 3: the configuration wins" in caplog.text
    assert "ReferenceUpdate.mixup was 0.5 and is 1.0: the configuration wins" in caplog.text


def test_a_reference_of_other_weights_is_refused(tiny_policy):
    policy = tiny_policy(reference=True)
    state = policy.reference.state()
    name, weight = next(iter(state.items()))
    with pytest.raises(UserError, match=f"does not fit the policy: '{name}' is not the same"):
        policy.reference.load({n: w for n, w in state.items() if n != name})
    with pytest.raises(UserError, match=f"does not fit the policy: '{name}' is not the same"):
        policy.reference.load(state | {name: weight[:1]})
    with pytest.raises(UserError, match="does not fit the policy: 'another' is not the same"):
        policy.reference.load(state | {"another": weight})
