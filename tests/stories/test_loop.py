"""The training loop is Lightning's own, on real, tiny runs."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.objective.action_spaces import BlockActions, FutureShare, SequenceActions
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import FullVocabulary, MinP, Nucleus, TopK
from lightning_mpo.policies import CausalPolicy, ParallelHeads, TinyPolicy
from lightning_mpo.rollout.parity import ParityError
from lightning_mpo.sampling import LocalSampler
from tests.support.runs import (
    Digits,
    Probe,
    adam,
    distance,
    fit,
    make_data,
    make_objective,
    make_policy,
    same,
    sgd,
)

ROOT = Path(__file__).parents[2]
PLANS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (2, 2, 3), (4, 1, 4)]
REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(8)]


class Slots(Callback):
    """Writes down what each slot was given."""

    def __init__(self) -> None:
        self.rows, self.steps, self.flags, self.weights = [], [], [], []
        self.first_ratio, self.counters = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        source = module.source
        batch_rows = batch["micro_batch"].rollout
        self.rows.append(batch_rows)
        self.flags.append((batch["first_update"], batch["last_of_update"]))
        self.steps.append(trainer.global_step)
        self.counters.append(source.counter)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append(
            torch.cat([weight.detach().flatten() for weight in module.policy.parameters()])
        )


# --- updates ----------------------------------------------------------------------------------------------------------


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
    objective = make_objective(kl=KLPenalty(ConstantCoefficient(0.1)))
    run = fit(tmp_path, objective=objective, max_steps=1)
    held = {
        id(weight) for group in run.trainer.optimizers[0].param_groups for weight in group["params"]
    }
    assert held == {id(weight) for weight in run.module.policy.network.parameters()}
    assert run.module.policy.reference_network is not None


# --- no staleness -----------------------------------------------------------------------------------------------------


def test_the_loader_has_a_length_and_is_no_torch_loader():
    loader = SlotLoader(3)
    assert len(loader) == 3
    assert list(loader) == [{}, {}, {}]
    assert list(loader) == [{}, {}, {}], "it keeps no position"
    assert not isinstance(loader, DataLoader)
    assert not hasattr(loader, "state_dict")
    assert len({id(slot) for slot in list(loader)}) == 3, "each slot gets a dict of its own"


@pytest.mark.parametrize("support", [None, TopK(4)], ids=["full", "top4"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_each_rollout_is_drawn_from_the_policy_as_of_its_first_update(
    tmp_path, support, minibatches
):
    """Re-score what was sampled with the weights of that very moment: one update of lag would show."""
    off, moved = [], []

    def check(trainer, module, batch, batch_idx):
        rollout = batch["micro_batch"].rollout
        with torch.no_grad():
            now = module.policy.score(
                rollout, rollout.response_mask_BT, temperature=module.temperature
            ).logprobs_BT
        (off if batch["first_update"] else moved).append(
            (now - rollout.behaviour_logprobs_BT).abs().max().item()
        )

    objective = make_objective(**({"support": support} if support else {}))
    run = fit(
        tmp_path,
        rollout={"minibatches": minibatches},
        max_steps=5,
        objective=objective,
        callbacks=[Probe(on_train_batch_start=check)],
        module={"optimizer": adam(1e-2), "temperature": 0.8},
        first=True,
    )
    assert max(off) < 5e-6, "the rollout is of other weights than its first update"
    assert run.rollout.counter == -(-5 // minibatches)
    if minibatches > 1:
        assert min(moved) > 1e-2, "the second update finds the policy moved"
        ratios = run.record.column("ratio/abs_log")
        assert ratios[0::2] == pytest.approx([0, 0, 0], abs=1e-6)
        assert min(ratios[1::2]) > 1e-3
    else:
        assert run.record.column("ratio/abs_log") == [0.0] * 5


def test_rollouts_ask_for_the_prompts_of_their_counter(tmp_path):
    data, asked = make_data(), []
    rows = data.training_rows

    def spy(counter, count, round=0):
        asked.append((counter, count, round))
        return rows(counter, count, round)

    data.training_rows = spy
    fit(tmp_path, rollout={"minibatches": 2}, max_steps=9, data=data)
    assert asked == [(counter, 4, 0) for counter in range(5)]


def test_prompts_are_a_pure_function_of_the_counter():
    def texts(data, counter, round=0):
        return [row.prompt for row in data.training_rows(counter, 5, round)]

    forwards, backwards = make_data(seed=3), make_data(seed=3)
    first = {counter: texts(forwards, counter) for counter in range(9)}
    assert {counter: texts(backwards, counter) for counter in reversed(range(9))} == first
    assert sorted(sum((first[counter] for counter in range(9)), [])[:12]) == sorted(
        row.prompt for row in forwards.splits.train
    ), "a pass holds each prompt once"
    assert texts(make_data(seed=4), 0) != first[0]
    assert (
        texts(forwards, 2, round=1) == texts(backwards, 2, round=1) != texts(forwards, 2, round=2)
    )


def test_estimated_stepping_batches_is_never_read():
    files = [*(ROOT / "lightning_mpo").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "value", None)
            assert name != "estimated_stepping_batches", (
                f"{path} reads it; a loader's saved state is then dropped"
            )


# --- what a run refuses ------------------------------------------------------------------------------------------------

REFUSED = {
    "limit_train_batches": (
        {"limit_train_batches": 6, "accumulate_grad_batches": 2},
        {"minibatches": 2},
        "a multiple",
    ),
    "share": ({"limit_train_batches": 0.5}, {}, "not a share"),
    "val_check_interval": ({"val_check_interval": 3}, {}, "check_val_every_n_epoch: null"),
    "a share of validation": (
        {"val_check_interval": 0.34},
        {},
        "val_check_interval` must be a whole number of updates",
    ),
    "bf16-true": ({"precision": "bf16-true"}, {}, "bf16-mixed"),
    "accumulation": ({"accumulate_grad_batches": 20}, {}, "accumulate_grad_batches"),
    "minibatches": ({}, {"minibatches": 3}, "must divide"),
    "rewards": ({}, {"rewards": []}, "rollout.rewards"),
    "completions": ({}, {"completions": 1}, "rollout.completions"),
    "max_new_tokens": ({}, {"max_new_tokens": 0}, "max_new_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_weight_is_loaded(tmp_path, monkeypatch, name):
    from lightning_mpo.policies import TinyPolicy

    monkeypatch.setattr(
        TinyPolicy, "build", lambda *args, **kwargs: pytest.fail("the policy was built")
    )
    trainer, rollout, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        fit(tmp_path, rollout=rollout, **trainer)


def test_scaled_losses_are_refused(tmp_path, monkeypatch):
    """On the CPU Lightning takes bfloat16 for it."""
    monkeypatch.setattr(L.Trainer, "precision", "16-mixed")
    with pytest.raises(
        UserError, match="leaves out the updates whose gradients overflow; use `bf16-mixed`"
    ):
        fit(tmp_path)


def test_accumulation_schedules_are_refused(tmp_path):
    with pytest.raises(UserError, match="GradientAccumulationScheduler"):
        fit(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})])


def test_a_run_without_the_rollout_callback_names_it():
    from tests.support.runs import make_policy, make_trainer

    module = PolicyOptimization(make_policy(), make_objective())
    with pytest.raises(UserError, match="lightning_mpo.callbacks.Rollout"):
        make_trainer(Path("."), [], max_steps=1).fit(module, datamodule=make_data())


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_shrinks_a_rollout_to_one_slot(tmp_path, batches):
    slots = Slots()
    run = fit(
        tmp_path,
        rollout={"minibatches": 4, "epochs": 2},
        accumulate_grad_batches=2,
        fast_dev_run=batches,
        limit_val_batches=1,
        callbacks=[slots],
    )
    assert run.trainer.global_step == batches
    assert run.rollout.counter == batches
    assert [len(part.group_B) for part in slots.rows] == [16] * batches


def test_a_whole_limit_is_an_epoch(tmp_path):
    run = fit(
        tmp_path,
        rollout={"minibatches": 2},
        accumulate_grad_batches=2,
        limit_train_batches=8,
        max_steps=-1,
        max_epochs=2,
    )
    assert run.trainer.global_step == 2 * 4
    assert run.rollout.counter == 4, "the second epoch goes on with the third rollout"


# --- one gradient, however it is cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: type(reduction).__name__)
def test_cutting_an_update_into_micro_batches_changes_no_weight(tmp_path, reduction):
    """SGD, as Adam would blow rounding up; lengths differ, so a mean of means would show."""
    objectives = {
        "tokens": make_objective(reduction=reduction),
        "blocks": make_objective(
            reduction=reduction, actions=BlockActions(FutureShare(0.3), length=3), support=TopK(6),
            kl=KLPenalty(ConstantCoefficient(0.2)),
        ),
    }  # fmt: skip
    for objective in objectives.values():
        runs = {
            cuts: fit(
                tmp_path,
                rollout={"minibatches": 2, "max_new_tokens": 16},
                objective=objective,
                accumulate_grad_batches=cuts,
                max_steps=4,
                module={"optimizer": sgd(0.02)},
            )
            for cuts in (1, 2, 4)
        }
        start = fit(
            tmp_path, objective=objective, module={"optimizer": sgd(0.0)}, max_steps=1
        ).weights
        assert distance(runs[1].weights, start) > 1e-4
        for cuts in (2, 4):
            assert distance(runs[cuts].weights, runs[1].weights) < 1e-6
            for (step, whole), (other, cut) in zip(
                runs[1].record.lines, runs[cuts].record.lines, strict=True
            ):
                assert step == other
                assert {k: v for k, v in cut.items()} == pytest.approx(whole, rel=2e-4, abs=2e-6)


def test_metrics_are_logged_once_an_update_and_weighted_over_its_micro_batches(tmp_path):
    """Against a sum over the micro-batches by hand, through the CSV file."""
    parts = []
    loss = PolicyOptimization._add

    def spy(self, metrics):
        parts.append(
            {name: (value.item(), weight.item()) for name, (value, weight) in metrics.items()}
        )
        loss(self, metrics)

    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyOptimization, "_add", spy)
        fit(
            tmp_path, rollout={"minibatches": 2, "max_new_tokens": 24}, accumulate_grad_batches=3, max_steps=4, logger=logger,
            module={"optimizer": adam(1e-2)},
        )  # fmt: skip
    import csv

    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(line["step"]) for line in lines] == [0, 1, 2, 3]
    differs = 0
    for update, line in enumerate(lines):
        three = parts[3 * update : 3 * update + 3]
        for name in (
            "policy/entropy",
            "kl/old",
            "ratio/mean",
            "ratio/abs_log",
            "ratio/clip_fraction",
        ):
            total, weight = (sum(part[name][i] for part in three) for i in (0, 1))
            assert float(line[name]) == pytest.approx(total / weight, rel=1e-5, abs=1e-9), name
            last = three[-1][name][0] / three[-1][name][1]
            differs += abs(last - total / weight) > 1e-3
        assert float(line["loss/surrogate"]) == pytest.approx(
            sum(part["loss/surrogate"][0] for part in three), rel=1e-5, abs=1e-8
        )
        assert len({part["policy/entropy"][1] for part in three}) > 1, (
            "micro-batches of one size show nothing"
        )
    assert differs > 4, "the last micro-batch alone would have passed"


def test_a_rollouts_numbers_stand_beside_each_of_its_updates(tmp_path):
    run = fit(tmp_path, rollout={"minibatches": 2, "rewards": [Digits(weight=2.0)]}, max_steps=4)
    assert run.record.column("rollout/counter") == [0, 0, 1, 1]
    rewards = run.record.column("reward/mean")
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3]
    assert run.record.column("reward/digits") == pytest.approx([reward / 2 for reward in rewards])


def test_reward_metrics_are_those_of_the_rollout(tmp_path):
    events = []

    class Keep(Digits):
        def score(self, completions):
            events.append(completions)
            return super().score(completions)

    run = fit(
        tmp_path,
        rollout={"rewards": [Keep()], "max_new_tokens": 24},
        max_steps=1,
        objective=make_objective(support=TopK(3)),
    )
    (completions,) = events
    scores = torch.tensor(Digits().score(completions), dtype=torch.float64)
    line = run.record.lines[0][1]
    assert line["reward/mean"] == pytest.approx(scores.mean().item(), rel=1e-6)
    assert line["reward/std"] == pytest.approx(scores.std().item(), rel=1e-5)
    assert line["rollout/length"] == pytest.approx(sum(done.tokens for done in completions) / 16)
    assert line["rollout/truncated"] == pytest.approx(
        sum(not done.finished for done in completions) / 16
    )
    assert 0 < line["support/kept_mass"] < 1


# --- around the rollout ------------------------------------------------------------------------------------------------


class Right(Digits):
    """Says what is right: `val/pass_at_1` needs a reward that does."""

    is_accuracy = True


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
    assert "actions SequenceActions(mean=True, form=sequence)" in text
    assert "parity sampler against trainer" in text


# --- stops and checkpoints ----------------------------------------------------------------------------------------------


def test_checkpoints_of_every_n_train_steps_are_of_those_updates(tmp_path):
    weights = {}
    keep = Probe(
        on_train_batch_end=lambda trainer, module, outputs, batch, i: weights.setdefault(
            trainer.global_step,
            {k: w.detach().clone() for k, w in module.policy.named_parameters()},
        )
    )
    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    fit(
        tmp_path,
        rollout={"minibatches": 4},
        accumulate_grad_batches=2,
        max_steps=10,
        callbacks=[keep, save],
    )
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        "step=3.ckpt",
        "step=6.ckpt",
        "step=9.ckpt",
    }
    for step in (3, 6, 9):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert state["global_step"] == step
        ready = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert ready == 2 * step, "saved after an optimiser step"
        assert same({k: state["state_dict"][f"policy.{k}"] for k in weights[step]}, weights[step])


@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_a_stop_within_an_update_waits_for_its_end(tmp_path, slot):
    """`Timer`, `KLTracking` and others set `should_stop` in any slot; half an update's gradient is in no checkpoint."""

    def stop(trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == slot

    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run = fit(
        tmp_path,
        rollout={"minibatches": 2},
        accumulate_grad_batches=4,
        max_steps=8,
        callbacks=[Probe(on_train_batch_end=stop), save],
    )
    assert run.trainer.global_step == 1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 4


def test_the_reference_is_in_no_checkpoint(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    objective = make_objective(kl=KLPenalty(ConstantCoefficient(0.1)))
    run = fit(
        tmp_path,
        objective=objective,
        callbacks=[save],
        max_steps=2,
        module={"optimizer": adam(1e-2)},
    )
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {
        f"policy.network.{key}" for key in run.module.policy.network.state_dict()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    reference = run.module.policy.reference_network.state_dict()[name]
    assert torch.equal(
        state[f"policy.network.{name}"], run.module.policy.network.state_dict()[name]
    )
    assert not torch.equal(state[f"policy.network.{name}"], reference)
    assert all("reference" not in key for key in state)


@pytest.mark.parametrize("support", [Nucleus(0.25, 6), MinP(0.8, 6)], ids=["nucleus", "min_p"])
@pytest.mark.parametrize("source", ["backbone", "mtp"])
def test_supports_of_varying_size_go_through_sampler_gate_blocks_and_updates(
    tmp_path, support, source
):
    blocks = BlockActions(FutureShare(0.2), length=3, source=source)
    policy = make_policy(mtp=ParallelHeads(offsets=2) if source == "mtp" else None)
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    run = fit(
        tmp_path,
        policy=policy,
        objective=make_objective(support=support, actions=blocks),
        rollout={"minibatches": 2},
        callbacks=[probe],
        first=True,
        max_steps=2,
    )
    assert run.record.column("ratio/mean")[0] == pytest.approx(1, abs=1e-5)
    slots = seen[0].rollout.support_mask_BTK[seen[0].mask_BT]
    assert 1 < slots.sum(-1).float().mean() < 6


class Lossy(LocalSampler):
    """Loses the sampled token from its support at the first step of every response, as an external engine may."""

    def sample(self, *args, **options):
        rollout = super().sample(*args, **options)
        if rollout.support_BTK is not None:
            first = rollout.support_BTK[:, 0]
            first[first == rollout.responses_BT[:, :1]] = (
                0  # the padding token, which is never sampled here
            )
        return rollout


@pytest.mark.parametrize(("outside", "scored"), [("unite", True), ("drop", False)])
def test_tokens_outside_their_support_are_counted_and_may_be_left_without_loss(
    tmp_path, outside, scored
):
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    run = fit(
        tmp_path,
        objective=make_objective(support=TopK(4, outside=outside)),
        rollout={"sampler": Lossy()},
        callbacks=[probe],
        first=True,
        max_steps=1,
    )
    assert seen[0].rollout.outside_BT[:, 0].all()
    assert seen[0].mask_BT[:, 0].all() == scored
    assert seen[0].mask_BT[:, 1:].equal(seen[0].rollout.response_mask_BT[:, 1:])
    tokens = seen[0].rollout.response_mask_BT.sum().item()
    assert run.record.column("support/hit_rate") == [pytest.approx(1 - 16 / tokens)]
    with pytest.raises(
        UserError, match="16 of .* sampled tokens are not in the support stored with them"
    ):
        fit(
            tmp_path,
            objective=make_objective(support=TopK(4)),
            rollout={"sampler": Lossy()},
            max_steps=1,
        )


def test_validation_samples_untruncated_and_with_the_training_support(tmp_path):
    def lines(support):
        run = fit(
            tmp_path,
            objective=make_objective(support=support),
            rollout={"rewards": [Right()]},
            max_steps=2,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            limit_val_batches=1,
        )
        return {
            name: value
            for _, line in run.record.lines
            for name, value in line.items()
            if name.startswith("val/")
        }

    full, top = lines(FullVocabulary()), lines(TopK(1))
    assert {"val/pass_at_1", "val/support_pass_at_1", "val/support_length"} <= top.keys()
    assert not any("support" in name for name in full)
    assert (
        top["val/reward"] != top["val/support_reward"]
    )  # greedy is what a support of one token means


def test_a_policy_that_ignores_the_support_for_its_reference_is_refused(tmp_path):
    class Mixing(TinyPolicy):
        def score(self, rollout, mask_BT, *, reference=False, **options):
            if reference:
                rollout = replace(rollout, support_BTK=None, support_mask_BTK=None)
            return super().score(rollout, mask_BT, reference=reference, **options)

    policy = Mixing("0123456789+-*=;, ", hidden_size=32, layers=2, heads=2)
    objective = make_objective(support=TopK(4), kl=KLPenalty(ConstantCoefficient(0.1)))
    with pytest.raises(UserError, match="log-probs of the reference are over the whole vocabulary"):
        fit(tmp_path, policy=policy, objective=objective, max_steps=1)
