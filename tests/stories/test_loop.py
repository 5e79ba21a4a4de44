"""How a rollout is spent: updates, micro-batches, rows, clipping and schedules."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.policies import CausalPolicy
from tests.support.loops import Slots
from tests.support.runs import Probe, fit, make_objective, sgd

PLANS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (2, 2, 3), (4, 1, 4)]


@pytest.mark.parametrize(("minibatches", "epochs", "accumulate"), PLANS)
def test_a_rollout_is_spent_in_minibatches_x_epochs_updates_of_accumulate_micro_batches(
    tmp_path, minibatches, epochs, accumulate
):
    slots, updates = Slots(), minibatches * epochs
    run = fit(
        tmp_path,
        rollout={"minibatches": minibatches, "epochs": epochs},
        accumulate_grad_batches=accumulate,
        max_steps=2 * updates,
        callbacks=[slots],
    )
    assert run.trainer.global_step == 2 * updates
    assert run.rollout.counter == 2
    assert len(slots.steps) == 2 * updates * accumulate
    assert slots.steps == [k for k in range(2 * updates) for _ in range(accumulate)]
    assert slots.counters == [1] * updates * accumulate + [2] * updates * accumulate
    assert [last for _, last in slots.flags] == ([False] * (accumulate - 1) + [True]) * 2 * updates
    assert [first for first, _ in slots.flags][: updates * accumulate] == [
        u == 0 for u in range(updates) for _ in range(accumulate)
    ]
    # each pass over the rollout holds each row once, an update its share of them
    per_pass = minibatches * accumulate
    for start in range(0, len(slots.rows), per_pass):
        assert sum(len(part.group_B) for part in slots.rows[start : start + per_pass]) == 16
    for start in range(0, len(slots.rows), accumulate):
        assert (
            sum(len(part.group_B) for part in slots.rows[start : start + accumulate])
            == 16 // minibatches
        )
    changed = [
        not torch.equal(a, b) for a, b in zip(slots.weights, slots.weights[1:], strict=False)
    ]
    assert changed == [(k + 2) % accumulate == 0 for k in range(len(changed))], (
        "weights move in the last slot only"
    )


def test_max_steps_counts_updates_also_in_the_middle_of_a_rollout(tmp_path):
    run = fit(tmp_path, rollout={"minibatches": 4}, accumulate_grad_batches=2, max_steps=7)
    assert run.trainer.global_step == 7
    assert run.trainer.fit_loop.epoch_loop.total_batch_idx == 7 * 2 - 1
    assert run.rollout.counter == 2


def test_epochs_are_passes_over_the_prompts(tmp_path):
    run = fit(
        tmp_path, rollout={"minibatches": 2}, accumulate_grad_batches=2, max_steps=-1, max_epochs=2
    )
    assert run.rollout.counter == 2 * 3, "12 prompts, 4 a rollout"
    assert run.trainer.global_step == 2 * 3 * 2


def test_rows_of_an_update_are_sorted_by_length_and_trimmed(tmp_path):
    seen = []
    score = CausalPolicy.score

    def spy(self, rollout, mask_BT, **options):
        if torch.is_grad_enabled():
            seen.append(rollout)
        return score(self, rollout, mask_BT, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalPolicy, "score", spy)
        fit(tmp_path, accumulate_grad_batches=4, max_steps=3, rollout={"max_new_tokens": 24})
    shorter = 0
    for start in range(0, 12, 4):
        longest = [
            int(rollout.response_mask_BT.sum(1).max()) for rollout in seen[start : start + 4]
        ]
        assert longest == sorted(longest, reverse=True)
        assert [rollout.response_mask_BT.shape[1] for rollout in seen[start : start + 4]] == longest
        shorter += longest[-1] < longest[0]
    assert shorter, "no micro-batch was shorter than another: the test shows nothing"


def test_gradients_are_clipped_by_the_trainer_and_logged_unclipped(tmp_path):
    free = fit(tmp_path, max_steps=1, module={"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)})
    tied = fit(
        tmp_path,
        max_steps=1,
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)},
        gradient_clip_val=0.01,
    )
    start = fit(
        tmp_path, max_steps=1, module={"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    ).weights

    def moved(weights):
        return torch.stack([(weights[name] - start[name]).norm() for name in start]).norm().item()

    assert moved(tied.weights) == pytest.approx(0.01, rel=1e-4)
    norm = free.record.column("optim/grad_norm")[0]
    assert norm > 0.1
    assert moved(free.weights) == pytest.approx(norm, rel=1e-4)
    assert tied.record.column("optim/grad_norm")[0] == pytest.approx(norm, rel=1e-6)


def test_the_scheduler_steps_per_update(tmp_path):
    rates = []
    probe = Probe(
        on_train_batch_start=lambda trainer, *_: rates.append(
            trainer.optimizers[0].param_groups[0]["lr"]
        )
    )
    module = {
        "optimizer": sgd(1.0),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    }
    fit(
        tmp_path, rollout={"minibatches": 2}, accumulate_grad_batches=2, max_steps=4, callbacks=[probe], module=module,
        gradient_clip_val=1e-6,
    )  # fmt: skip
    assert rates == [0.5**k for k in range(4) for _ in range(2)]


def test_the_optimiser_holds_what_is_trained_and_nothing_else(tmp_path):
    objective = make_objective(terms=[KLPenalty(ConstantCoefficient(0.1))])
    run = fit(tmp_path, objective=objective, max_steps=1)
    held = {
        id(weight) for group in run.trainer.optimizers[0].param_groups for weight in group["params"]
    }
    assert held == {id(weight) for weight in run.module.policy.network.parameters()}
    assert run.module.policy.reference_network is not None
