"""The reference moves when it should, to where it should, and a resumed run has it where it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mpo.callbacks import ExactResume, KLTracking, ReferenceUpdate, Report
from lightning_mpo.errors import UserError
from lightning_mpo.export.verify import observe
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.warmup import SupervisedWarmup
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora, Quantization
from tests.policies.test_quantization import folder as four_folder  # noqa: F401  64 dimensions
from tests.support.builders import make_prompts
from tests.support.many_ranks import double
from tests.support.runs import (
    Run,
    adam,
    fit,
    make_data,
    make_objective,
    make_policy,
    make_trainer,
    same,
)

LORA = Lora(rank=2, alpha=4)


class Keep(RolloutCallback):
    """Keeps what was there when each rollout began, before the reference moved, and how far apart it was scored."""

    def __init__(self) -> None:
        self.policies, self.apart, self.stored = [], [], []

    def on_rollout_start(self, trainer, module, sequences, limit):
        self.policies.append(
            {n: w.detach().clone() for n, w in module.policy.network.named_parameters()}
        )

    def on_rollout_end(self, trainer, module, event):
        rollout = event.experience.rollout
        now_BT, reference_BT = (
            module.score(rollout, reference=flag).logprobs_BT for flag in (False, True)
        )
        self.apart.append((now_BT - reference_BT).abs().max().item())
        self.stored.append(torch.equal(event.experience.reference_logprobs_BT, reference_BT))


def kind(name: str, request) -> CausalPolicy:
    """Return an unbuilt policy: all of whose weights are trained, with adapters, or with adapters on 4 bits."""
    if name == "copy":
        return make_policy()
    if name == "lora":
        return CausalPolicy(request.getfixturevalue("tiny_folder"), lora=LORA)
    source = request.getfixturevalue("four_folder")
    return CausalPolicy(source, lora=LORA, quantization=Quantization(compute_dtype="float32"))


def run(folder, policy, update, *, updates=5, callbacks=(), objective=None, **options) -> Run:
    torch.manual_seed(
        7 if options.get("ckpt_path") is None else 8
    )  # of the adapters, which a resume has to find again
    callbacks = [*callbacks, *([update] if update else [])]
    penalised = make_objective(kl=KLPenalty(ConstantCoefficient(0.2)))
    module = {"optimizer": adam(1e-2)}
    return fit(
        folder, policy=policy, objective=objective or penalised, callbacks=callbacks, max_steps=updates, module=module,
        **options,
    )  # fmt: skip


def reference_of(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights that a score of the reference computes with: adapters, or all of a copy."""
    policy = run.module.policy
    with policy.as_reference():
        weights = dict(policy._network(reference=True).named_parameters())
        return {
            n: w.detach().clone() for n, w in weights.items() if policy.lora is None or "lora_" in n
        }


# --- where it moves to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy", "lora", "four"])
def test_a_refreshed_reference_is_the_policy_that_samples_the_rollout(tmp_path, request, name):
    """At rollouts 2 and 4 of five, and the base under adapters stays as it is to the bit."""
    keep = Keep()
    done = run(tmp_path, kind(name, request), ReferenceUpdate(every=2), callbacks=[keep])
    assert [apart < 1e-6 for apart in keep.apart] == [True, False, True, False, True], keep.apart
    assert min(keep.apart[1], keep.apart[3]) > 1e-3
    assert all(keep.stored), "the log-probs of the rollout are of another reference"
    bases = [
        {n: w for n, w in part.items() if "lora_" not in n}
        for part in (keep.policies[0], dict(done.module.policy.network.named_parameters()))
    ]
    if name != "copy":
        assert same(*bases)
        assert done.module.policy.reference_network is None
    else:
        assert not same(*bases)


def test_of_a_frozen_copy_all_weights_are_averaged(tmp_path):
    keep = Keep()
    done = run(tmp_path, make_policy(), ReferenceUpdate(every=2, mixup=0.3), callbacks=[keep])
    expected = {n: w.double() for n, w in keep.policies[0].items()}
    for counter in (2, 4):
        expected = {
            n: 0.3 * keep.policies[counter][n].double() + 0.7 * w for n, w in expected.items()
        }
    found = dict(done.module.policy.reference_network.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-7)
    assert not any(weight.requires_grad for weight in found.values())
    assert not same(found, dict(done.module.policy.network.named_parameters()))


@pytest.mark.parametrize("begun", [False, True], ids=["base", "checkpoint"])
def test_of_adapters_a_and_b_are_averaged_apart(tmp_path, tiny_folder, begun):
    """From those of the checkpoint where the run began with some; else from B = 0 and the A of when it first moves."""
    checkpoint = None
    if begun:
        run(
            tmp_path,
            CausalPolicy(tiny_folder, lora=LORA),
            None,
            updates=2,
            callbacks=[_saving(tmp_path)],
        )
        checkpoint = str(tmp_path / "last.ckpt")
    keep = Keep()
    policy = CausalPolicy(tiny_folder, lora=LORA, checkpoint=checkpoint)
    done = run(
        tmp_path / "after", policy, ReferenceUpdate(every=1, mixup=0.3), callbacks=[keep], updates=4
    )
    expected = {n: w.double() for n, w in keep.policies[0].items() if "lora_" in n}
    if not begun:
        expected = {n: w * ("lora_A" in n) for n, w in keep.policies[1].items() if n in expected}
    assert begun == any(bool(w.any()) for n, w in expected.items() if "lora_B" in n)
    for counter in (1, 2, 3):
        expected = {
            n: 0.3 * keep.policies[counter][n].double() + 0.7 * w for n, w in expected.items()
        }
    found = reference_of(done)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-7)


def test_mixing_factors_differs_from_mixing_products_as_it_is_said(tiny_folder):
    policy = double(CausalPolicy(tiny_folder, lora=Lora(rank=2, alpha=6)))
    policy.build(device=torch.device("cpu"), reference=True)
    layers = [part for part in policy.network.modules() if hasattr(part, "lora_A")]

    def draw():
        for layer in layers:
            torch.nn.init.normal_(layer.lora_A["default"].weight)
            torch.nn.init.normal_(layer.lora_B["default"].weight)

    def added(reference):
        """Return A and B of each layer, and what they add to the base."""
        with policy.as_reference(reference), torch.no_grad():
            parts = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
            return [
                (a.clone(), b.clone(), x.get_delta_weight("default"))
                for x, (a, b) in zip(layers, parts, strict=True)
            ]

    draw()
    policy.mix_reference(1.0)
    draw()
    m, now, before = 0.3, added(False), added(True)
    policy.mix_reference(m)
    assert len(layers) == 14
    for (a, b, policys), (a_, b_, references), (_, _, mixed) in zip(
        now, before, added(True), strict=True
    ):
        off = mixed - (m * policys + (1 - m) * references)
        torch.testing.assert_close(off, -m * (1 - m) * (b - b_) @ (a - a_) * 6 / 2)  # alpha / rank


def test_nobody_but_the_penalty_notices(tmp_path, tiny_folder):
    """Where the reference is only watched, weights and samples are those of a run whose reference stays."""
    runs = [
        run(
            tmp_path / str(i),
            CausalPolicy(tiny_folder, lora=LORA),
            update,
            callbacks=[KLTracking()],
            objective=make_objective(),
        )
        for i, update in enumerate((None, ReferenceUpdate(every=2, mixup=0.5)))
    ]
    assert same(runs[0].weights, runs[1].weights)
    still, moving = (run.record.column("kl/rollout_mean") for run in runs)
    assert still[:2] == moving[:2]
    assert all(near < far for near, far in zip(moving[2:], still[2:], strict=True))


def test_an_export_is_still_compared_with_the_base(tmp_path, tiny_folder):
    policy = CausalPolicy(tiny_folder, lora=LORA)
    run(tmp_path, policy, ReferenceUpdate(every=1), updates=3)
    policy.mix_reference(1.0)
    moved = observe(policy, make_prompts([5, 3]), 1.0)
    base = CausalPolicy(tiny_folder, lora=LORA)
    base.build(device=torch.device("cpu"), reference=True)
    mask_BT = moved.sampled.response_mask_BT
    with torch.no_grad():
        expected = base.score(moved.sampled, mask_BT, temperature=1.0, reference=True).logprobs_BT[
            mask_BT
        ]
    torch.testing.assert_close(moved.base_logprobs_n, expected, rtol=0, atol=1e-5)
    assert (moved.base_logprobs_n - moved.logprobs_n).abs().max() > 1e-3


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _saving(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)


def train(folder, policy, *, update=None, ckpt_path=None, **options) -> Run:
    """Five rollouts of two updates each; the reference moves before the third and the fifth."""
    update = update or ReferenceUpdate(every=2, mixup=0.5)
    objective = make_objective(
        support=TopK(6, from_reference=True), kl=KLPenalty(ConstantCoefficient(0.2))
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
    assert same(module.policy.reference_state(), reference_of(done))


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
    module = PolicyOptimization(make(), make_objective(kl=KLPenalty(ConstantCoefficient(0.2))))
    module.policy.build(device=torch.device("cpu"), reference=True)
    update.setup(SimpleNamespace(callbacks=[], strategy=None), module, "fit")
    update.load_state_dict(
        torch.load(folder / "step=9.ckpt", weights_only=True)["callbacks"]["ReferenceUpdate"]
    )
    for counter, moved in ((4, False), (6, True)):
        update.on_rollout_start(
            done.trainer, SimpleNamespace(source=SimpleNamespace(counter=counter)), 1, 1
        )
        assert same(module.policy.reference_state(), reference_of(done)) != moved


def test_other_options_are_said(tmp_path, whole, caplog):
    _, folder, make = whole
    with caplog.at_level("INFO"):
        train(tmp_path, make(), update=ReferenceUpdate(every=3), ckpt_path=f"{folder}/step=8.ckpt")
    assert "ReferenceUpdate.every was 2 and is 3: the configuration wins" in caplog.text
    assert "ReferenceUpdate.mixup was 0.5 and is 1.0: the configuration wins" in caplog.text


def test_a_reference_of_other_weights_is_refused(tiny_policy):
    policy = tiny_policy(reference=True)
    state = policy.reference_state()
    name, weight = next(iter(state.items()))
    with pytest.raises(UserError, match=f"does not fit the policy: '{name}' is not the same"):
        policy.load_reference({n: w for n, w in state.items() if n != name})
    with pytest.raises(UserError, match=f"does not fit the policy: '{name}' is not the same"):
        policy.load_reference(state | {name: weight[:1]})
    with pytest.raises(UserError, match="does not fit the policy: 'another' is not the same"):
        policy.load_reference(state | {"another": weight})


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1])
def test_it_moves_every_rollout_or_less_often(every):
    with pytest.raises(UserError, match=f"`ReferenceUpdate.every` must be at least 1, got {every}"):
        ReferenceUpdate(every)


@pytest.mark.parametrize("mixup", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_of_the_policy_is_above_0_and_up_to_1(mixup):
    with pytest.raises(UserError, match="`ReferenceUpdate.mixup` must be in"):
        ReferenceUpdate(1, mixup)


def unloadable() -> CausalPolicy:
    policy = make_policy()
    policy.load_network = lambda: pytest.fail("a model was loaded")
    return policy


def test_a_run_without_a_reference_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(
        UserError, match="nothing here asks for one: give `objective.kl`, `KLTracking` or `Report`"
    ):
        fit(tmp_path, callbacks=[ReferenceUpdate(1)], policy=unloadable())
    trainer = make_trainer(tmp_path, [ReferenceUpdate(1), KLTracking()])
    with pytest.raises(UserError, match="nothing here asks for one"):
        trainer.fit(SupervisedWarmup(unloadable()), datamodule=make_data())


@pytest.mark.parametrize(
    "asks", [KLTracking(), Report(problems=2, completions=2, batch_size=4)], ids=["kl", "report"]
)
def test_who_asks_for_the_reference_may_stand_behind_it(tmp_path, asks):
    callbacks = [ReferenceUpdate(1), asks]
    done = fit(tmp_path, callbacks=callbacks, max_steps=2)
    assert done.module.policy.reference_network is not None
    if isinstance(asks, Report):
        assert asks.stages["final"]["kl"] > asks.stages["initial"]["kl"] >= 0


def test_policies_of_another_kind_are_refused():
    objective = make_objective(kl=KLPenalty(ConstantCoefficient(0.2)))
    module = PolicyOptimization(torch.nn.Identity(), objective)
    with pytest.raises(UserError, match="`ReferenceUpdate` needs a `CausalPolicy`, got Identity"):
        ReferenceUpdate(1).setup(SimpleNamespace(callbacks=[], strategy=None), module, "fit")


def test_shards_are_refused(tmp_path):
    module = PolicyOptimization(
        unloadable(), make_objective(kl=KLPenalty(ConstantCoefficient(0.2)))
    )
    trainer = SimpleNamespace(callbacks=[], strategy=ModelParallelStrategy())
    with pytest.raises(
        UserError,
        match="mixes whole weights, and FSDP2 keeps them in shards; use `trainer.strategy: ddp`",
    ):
        ReferenceUpdate(1).setup(trainer, module, "fit")
