"""What happens around a rollout: validation, precision, the parity gate, and stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.rollout.parity import ParityError
from tests.support.loops import Right
from tests.support.runs import Digits, Probe, fit, make_objective, same


def test_val_check_interval_counts_updates(tmp_path):
    steps = []
    probe = Probe(on_validation_start=lambda trainer, module: steps.append(trainer.global_step))
    run = fit(
        tmp_path,
        rollout={"minibatches": 2, "rewards": [Right()]},
        accumulate_grad_batches=2,
        max_steps=9,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        callbacks=[probe],
    )
    assert steps == [3, 6, 9]
    assert len(run.record.column("val/pass_at_1")) == 3


def test_validation_draws_from_its_own_generator(tmp_path):
    plain = fit(tmp_path, max_steps=4)
    watched = fit(
        tmp_path,
        max_steps=4,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    assert same(plain.weights, watched.weights)
    assert len(watched.record.column("val/reward")) == 4


def test_gradients_are_freed_before_a_rollout(tmp_path):
    seen = []

    class Look(Digits):
        def score(self, completions):
            seen.append([weight.grad is None for weight in policy.parameters()])
            return super().score(completions)

    from tests.support.runs import make_policy

    policy = make_policy()
    kept = []
    probe = Probe(
        on_train_batch_end=lambda *_: kept.append(
            any(w.grad is not None for w in policy.parameters())
        )
    )
    fit(tmp_path, policy=policy, rollout={"rewards": [Look()]}, max_steps=3, callbacks=[probe])
    assert len(seen) == 3
    assert all(all(rollout) for rollout in seen)
    assert all(kept), "without gradients after an update the test shows nothing"


def test_autocast_is_active_in_the_rollout_under_bf16_mixed(tmp_path):
    from lightning_mpo.sampling.local import LocalSampler

    active = []

    class Look(LocalSampler):
        def sample(self, policy, *args, **kwargs):
            active.append((torch.is_autocast_enabled("cpu"), next(policy.parameters()).dtype))
            return super().sample(policy, *args, **kwargs)

    run = fit(
        tmp_path, rollout={"sampler": Look(), "minibatches": 2}, precision="bf16-mixed", max_steps=2
    )
    assert active == [(True, torch.float32)]
    assert run.record.column("ratio/abs_log")[0] < 1e-6, (
        "old log-probs are scored under autocast, too"
    )
    active.clear()
    fit(tmp_path, rollout={"sampler": Look()}, max_steps=1)
    assert active == [(False, torch.float32)]


def test_the_parity_gate_refuses_before_any_update(tmp_path, monkeypatch):
    from lightning_mpo.sampling.local import LocalSampler

    sample = LocalSampler.sample
    monkeypatch.setattr(
        LocalSampler,
        "sample",
        lambda self, policy, prompts, completions, request, **options: sample(
            self, policy, prompts, completions, replace(request, temperature=0.5), **options
        ),
    )
    steps = []
    probe = Probe(on_before_optimizer_step=lambda *_: steps.append(1))
    with pytest.raises(ParityError, match=r"temperature 0\.5, the trainer 1\.0"):
        fit(tmp_path, callbacks=[probe])
    assert steps == []
    fit(tmp_path, callbacks=[probe], rollout={"parity_gate": False}, max_steps=1)
    assert steps == [1]


def test_the_rollout_callback_comes_first_wherever_it_was_listed(tmp_path):
    order = []

    class Early(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            order.append("micro_batch" in batch)

    fit(tmp_path, callbacks=[Early()], max_steps=2)
    assert order == [True, True]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    from tests.support.runs import make_policy

    policy = make_policy()
    before = []

    def spoil(trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            before.append(
                {name: weight.detach().clone() for name, weight in policy.named_parameters()}
            )
            batch["denominators"] = replace(
                batch["denominators"], actions=torch.tensor(float("nan"))
            )

    with pytest.raises(UserError, match="gradient norm of the policy is nan at update 1"):
        fit(tmp_path, policy=policy, callbacks=[Probe(on_train_batch_start=spoil)], first=True)
    assert same(dict(policy.named_parameters()), before[0])


def test_the_objective_and_the_batch_arithmetic_are_printed(tmp_path, caplog):
    import logging

    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        logging.getLogger("lightning.pytorch").propagate = True
        try:
            fit(
                tmp_path,
                rollout={"minibatches": 2},
                objective=make_objective(actions=SequenceActions()),
                max_steps=1,
            )
        finally:
            logging.getLogger("lightning.pytorch").propagate = False
    text = " ".join(caplog.text.split())
    assert "16 sequences a rollout, 2 updates of 8" in text
    assert "actions SequenceActions(mean=True, form='sequence')" in text
    assert "parity sampler against trainer" in text
