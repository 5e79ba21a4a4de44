"""`HeadDiagnostics`: it does not change training, logs the values of the measures, and warns once."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, HeadDiagnostics
from lightning_mpo.errors import UserError
from lightning_mpo.functional.head_diagnostics import expected_calibration_error
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.future_credit import CentredCredit, OutcomeCredit, StateCredit
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy, Lora, ParallelHeads
from lightning_mpo.resume.comparison import compare_runs
from lightning_mpo.resume.metrics_csv import MetricsCSV
from lightning_mpo.rollout.head_measures import HeadMeasures, rows_with_credit
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import take_rows
from tests.support.runs import Probe, adam, fit, make_objective, make_policy, same

MESSAGE = "`mtp/spurious` is"
NAMES = [
    *("mtp/ece_1", "mtp/ece_2", "mtp/excess_entropy_1", "mtp/excess_entropy_2"),
    *("mtp/trunk_gradient_future", "mtp/spurious"),
]


def heads_objective(credit=None, **axes):
    return make_objective(actions=BlockActions(source="mtp", credit=credit), **axes)


def run(folder, *callbacks, **options):
    torch.manual_seed(0)
    policy = make_policy(mtp=ParallelHeads(offsets=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`policy.mtp` start untrained")
        return fit(
            folder,
            **{
                "callbacks": callbacks,
                "policy": policy,
                "objective": heads_objective(),
                "rollout": {"minibatches": 2},
                "max_steps": 6,
                "module": {"optimizer": adam(1e-2)},
            }
            | options,
        )


class Keep(RolloutCallback):
    """Measures by itself, and keeps modes, gradients and random numbers around other callbacks."""

    def __init__(self):
        self.found, self.states = [], []

    def on_rollout_end(self, trainer, module, event):
        modes = [part.training for part in module.modules()]
        grads = [weight.grad for weight in module.parameters()]
        self.states.append((modes, grads, torch.get_rng_state()))
        measures, batch = HeadMeasures(module.scorer(), module.policy, 2), event.experience
        draws = generator_of(1, Stream.DIAGNOSE, event.counter, 0)
        part = take_rows(batch.rollout, torch.arange(7))
        excess = measures.excess(part, FullVocabulary(), states=5, samples=3, generator=draws)
        learnt = take_rows(batch, rows_with_credit(batch, 7))
        self.found.append(
            [
                *map(expected_calibration_error, measures.calibration(part)),
                *(excess[:, 0] / excess[:, 1]),
                *measures.gradients(module.objective, learnt, 100),
            ]
        )


def test_it_logs_what_the_measures_give_and_touches_nothing(tmp_path):
    before, after = Keep(), Keep()
    found = run(tmp_path, before, HeadDiagnostics(every=1, rows=7, states=5, samples=3), after)
    for rollout, values in enumerate(before.found):
        for name, value in zip(NAMES, values, strict=True):
            column = found.record.column(name)
            assert column[2 * rollout : 2 * rollout + 2] == pytest.approx([float(value)] * 2)
    for (modes, grads, state), (others, gradients, later) in zip(
        before.states, after.states, strict=True
    ):
        assert modes == others
        assert grads == gradients == [None] * len(grads)
        assert torch.equal(state, later)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_bit_for_bit(tmp_path, tiny_folder, dropout):
    """Also with adapters whose dropout draws from the global generator."""

    def train(*callbacks):
        policy = make_policy(mtp=ParallelHeads(offsets=2))
        if dropout:
            lora = Lora(rank=2, alpha=4, dropout=dropout)
            policy = CausalPolicy(tiny_folder, lora=lora, mtp=ParallelHeads(offsets=2))
        torch.manual_seed(0)
        draws = []
        look = Probe(on_train_batch_end=lambda *_: draws.append(torch.rand(1).item()))
        return run(tmp_path, look, *callbacks, policy=policy, max_steps=4), draws

    (plain, draws), (watched, same_draws) = train(), train(HeadDiagnostics(every=1, rows=6))
    assert same(plain.weights, watched.weights)
    assert draws == same_draws
    assert plain.record.column("reward/mean") == watched.record.column("reward/mean")
    assert len(watched.record.column("mtp/spurious")) == 4


def test_it_measures_every_few_rollouts_and_repeats_the_last_values(tmp_path):
    found = run(tmp_path, HeadDiagnostics(every=2, rows=4))
    column = found.record.column("mtp/ece_1")
    assert len(column) == 6
    assert column[0] == column[3] != column[4] == column[5]


@pytest.mark.parametrize(
    ("options", "responses", "rollouts"),
    [({}, 256, 7), ({}, 32, 50), ({}, 5000, 1), ({"rows": 4}, 32, 13), ({"every": 3}, 32, 3)],
)
def test_the_interval_follows_the_size_of_a_rollout(options, responses, rollouts):
    assert HeadDiagnostics(**options).interval(responses) == rollouts


def judge(values, credit=None, completions=4, callback=None) -> tuple[list[str], HeadDiagnostics]:
    """Return the warnings for a sequence of values of `mtp/spurious`, and the callback."""
    callback = callback or HeadDiagnostics()
    module = SimpleNamespace(
        objective=heads_objective(credit), source=SimpleNamespace(completions=completions)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in values:
            callback._judge(module, value)
    return [str(warning.message) for warning in caught], callback


@pytest.mark.parametrize(
    ("values", "mean"),
    [([9.0], None), ([0.2, 0.7], None), ([0.3, 0.6, 0.8, 3.0, 3.0], "0.7"), ([2.0, 0.5], "1.25")],
)
def test_it_warns_once_of_the_mean_of_two_measurements(values, mean):
    found, _ = judge(values)
    assert len(found) == (mean is not None)
    if mean is not None:
        assert f"{MESSAGE} {mean} in the mean of 2 measurements" in found[0]


@pytest.mark.parametrize(
    ("credit", "completions", "advice"),
    [
        (
            None,
            4,
            "`StateCredit` with `negatives: bound` (or to `OutcomeCredit`), or `policy.mtp.d",
        ),
        (CentredCredit("bound"), 4, "set `objective.actions.credit` to `StateCredit`"),
        (StateCredit("keep"), 4, "`StateCredit` with `negatives: bound`"),
        (StateCredit("bound"), 4, "set `policy.mtp.detach_trunk: true`, or lower `FutureShare.sh"),
        (OutcomeCredit("drop"), 4, "set `policy.mtp.detach_trunk: true`"),
        (None, 1, "set `policy.mtp.detach_trunk: true`"),
    ],
)
def test_the_warning_names_an_option_that_is_not_yet_set(credit, completions, advice):
    (found,), _ = judge([2.0, 2.0], credit, completions)
    assert advice in found


def test_the_state_goes_on(tmp_path):
    for before, after in (([0.9], [1.4]), ([2.0, 2.0], [2.0]), ([0.1, 0.2], [0.3])):
        whole, callback = judge(before + after)
        first, early = judge(before)
        resumed = HeadDiagnostics()
        resumed.load_state_dict(early.state_dict())
        second, _ = judge(after, callback=resumed)
        assert first + second == whole
        assert resumed.state_dict() == callback.state_dict()


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path):
    def train(name, **options):
        save = ModelCheckpoint(
            tmp_path / name / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True,
            enable_version_counter=False,
        )  # fmt: skip
        return run(
            tmp_path / name, HeadDiagnostics(every=2, rows=4), ExactResume(), save,
            logger=MetricsCSV(tmp_path / name, name="", version=""), **options,
        )  # fmt: skip

    train("whole")
    train("killed", max_steps=3)
    train("killed", ckpt_path=str(tmp_path / "killed/checkpoints/step=3.ckpt"))
    found = compare_runs(tmp_path / "whole", tmp_path / "killed")
    assert [part.difference for part in found if part.difference] == []
    tables = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "killed")]
    assert tables[0] == tables[1]
    assert b"mtp/spurious" in tables[0]


def test_values_are_means_over_processes(tmp_path):
    """Another process with the same rows changes nothing, and one without a gradient does not count."""
    alone = run(tmp_path, HeadDiagnostics(every=1, rows=4), max_steps=2)

    def double(trainer, module, **_):
        plain = module.over_ranks
        module.over_ranks = lambda sums: (
            2 * plain(sums) if sums.dtype == torch.float64 else plain(sums)
        )

    class Twice(RolloutCallback):
        on_rollout_end = staticmethod(lambda trainer, module, event: double(trainer, module))

    twice = run(tmp_path, Twice(), HeadDiagnostics(every=1, rows=4), max_steps=2)
    for name in NAMES:
        assert alone.record.column(name) == pytest.approx(twice.record.column(name))


def test_rollouts_without_an_advantage_say_nothing_of_gradients(tmp_path):
    class Flat(RolloutCallback):
        def on_rollout_end(self, trainer, module, event):
            event.experience.advantages_BT.zero_()

    found = run(tmp_path, Flat(), HeadDiagnostics(every=1, rows=4), max_steps=2)
    assert found.record.column("mtp/spurious") == []
    assert len(found.record.column("mtp/ece_1")) == 2


def test_it_refuses_a_run_without_heads(tmp_path):
    with pytest.raises(UserError, match=r"`objective.actions: TokenActions` uses none; .*-c mtp"):
        fit(tmp_path, callbacks=[HeadDiagnostics()])
    with pytest.raises(UserError, match=r"the policy has none; give `policy.mtp` \(-c mtp\)"):
        fit(tmp_path, callbacks=[HeadDiagnostics()], objective=heads_objective())
    with pytest.raises(UserError, match="measures rollouts, and `int` makes none"):
        HeadDiagnostics().setup(None, 3, "fit")


def test_it_refuses_shards(monkeypatch):
    from lightning.pytorch.strategies import ModelParallelStrategy

    from lightning_mpo.modules import PolicyOptimization

    policy = make_policy(mtp=ParallelHeads(offsets=2))
    module = PolicyOptimization(policy, heads_objective())
    trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(UserError, match="FSDP2 keeps them in shards; use `trainer.strategy: ddp`"):
        HeadDiagnostics().setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`HeadDiagnostics.every` must be at least 1, got 0"),
        ({"rows": 0}, "`HeadDiagnostics.rows` must be at least 1, got 0"),
        ({"states": -1}, "`HeadDiagnostics.states` must be at least 1, got -1"),
        ({"samples": 1}, "`HeadDiagnostics.samples` must be at least 2, got 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        HeadDiagnostics(**options)
