"""Dynamic sampling and the filter of truncated responses through the whole loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import Throughput, Watchdog
from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.action_spaces import BlockActions, FutureShare
from lightning_mpo.objective.advantages import (
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    ReturnToGo,
)
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import Nucleus, TopK
from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ParallelHeads, ValueHead
from lightning_mpo.rewards import OverlongPenalty
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.sampling import LocalSampler
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Finish
from tests.support.runs import (
    Digits,
    Probe,
    adam,
    distance,
    fit,
    make_objective,
    make_policy,
    same,
    sgd,
)


class FewLow(Digits):
    """Right where more than three quarters of the characters are digits below 5: groups of all kinds."""

    is_accuracy = True

    def score(self, completions):
        return [float(share > 0.75) for share in super().score(completions)]


class Always(Digits):
    """Right, whatever was written; the graded part of its score stays."""

    is_accuracy = True

    def score(self, completions):
        return [0.6 + 0.1 * share for share in super().score(completions)]


class Watch(RolloutCallback, LocalSampler):
    """Keeps what was sampled, in its order, and what became of it."""

    def __init__(self) -> None:
        LocalSampler.__init__(self)
        self.drawn, self.events, self.tokens = [], [], 0

    def sample(self, policy, prompts, completions, request, **options):
        state = options["generator"].get_state()
        rollout = super().sample(policy, prompts, completions, request, **options)
        if options.get("progress") is not None:
            self.drawn.append((rollout, state))
        return rollout

    def on_rollout_tokens(self, tokens, running):
        self.tokens += tokens

    def on_rollout_end(self, trainer, module, event):
        self.events.append((event, self.drawn))
        self.drawn = []


def train(
    folder: Path, rewards=None, *, rounds: int | None = 4, callbacks=(), rollout=None, **options
):
    watch = Watch()
    plan = {
        "rewards": rewards or [FewLow()],
        "sampler": watch,
        "dynamic": None if rounds is None else DynamicSampling(rounds),
    }
    return fit(
        folder, rollout=plan | (rollout or {}), callbacks=[watch, *callbacks], **options
    ), watch


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, Nucleus(0.9, 6)], ids=["full", "nucleus"])
def test_a_rollout_holds_the_first_useful_groups_of_its_rounds(tmp_path, support):
    """Against loops; prompts and random numbers are functions of (seed, rollout, rank, round) alone."""
    objective = make_objective(**({} if support is None else {"support": support}))
    run, watch = train(tmp_path, objective=objective, max_steps=8)
    data, kinds = run.trainer.datamodule, set()
    for counter, (event, drawn) in enumerate(watch.events):
        kept, dropped = [], []
        for round, (part, state) in enumerate(drawn):
            rows = data.training_rows(counter, 4, round)[: len(part.rows) // 4]
            assert list(part.rows[::4]) == rows
            stream, place = (
                (Stream.RESAMPLE, (counter, 0, round)) if round else (Stream.SAMPLE, (counter, 0))
            )
            assert torch.equal(state, generator_of(1, stream, *place).get_state())
            for start in range(0, len(part.texts), 4):
                texts = part.texts[start : start + 4]
                right = [
                    sum(c in "01234" for c in text) / max(len(text), 1) > 0.75 for text in texts
                ]
                (kept if 0 < sum(right) < 4 else dropped).append(texts)
        kept = kept[:4]
        missing = 4 - len(kept)
        assert missing == 0 or len(drawn) == 4, "rounds go on until the rollout is full"
        assert event.experience.rollout.texts == sum([*kept, *dropped[:missing]], ())
        assert event.experience.valid_B.tolist() == [True] * 4 * len(kept) + [False] * 4 * missing
        kinds.add((len(drawn) > 1, missing > 0))
    assert (True, False) in kinds, "no place was filled: the test shows nothing"


def test_metrics_say_what_was_thrown_away(tmp_path):
    run, watch = train(tmp_path, max_steps=4, callbacks=[Throughput()])
    tokens = 0
    for (_, line), (event, drawn) in zip(run.record.lines, watch.events, strict=True):
        rewards = [score_all([FewLow()], completions_of(part)).correct_B for part, _ in drawn]
        sums = torch.cat(rewards).view(-1, 4).sum(1)
        useful = int(((sums > 0) & (sums < 4)).sum())
        valid_B = event.experience.valid_B
        sampled = sum(int(part.response_mask_BT.sum()) for part, _ in drawn)
        trained = int(event.experience.rollout.response_mask_BT[valid_B].sum())
        tokens += sampled
        assert line["rollout/rounds"] == len(drawn)
        assert line["rollout/groups_dropped_right"] == int((sums == 4).sum())
        assert line["rollout/groups_dropped_wrong"] == int((sums == 0).sum())
        assert line["rollout/groups_missing"] == max(4 - useful, 0) == int((~valid_B).sum()) / 4
        assert line["rollout/groups_surplus"] == max(useful - 4, 0)
        assert line["rollout/tokens_dropped"] == sampled - trained
        assert line["rollout/accuracy_all"] == pytest.approx(
            torch.cat(rewards).float().mean().item()
        )
        assert line["reward/accuracy"] == pytest.approx(
            event.scores.correct_B.float().mean().item()
        )
        assert event.sampled_tokens == sampled
        assert event.accuracy == pytest.approx(line["rollout/accuracy_all"])
        assert line["throughput/rollout_tokens_per_s"] * line["time/rollout_s"] == pytest.approx(
            sampled
        )
    assert watch.tokens == tokens
    assert any(line["rollout/groups_dropped_wrong"] for _, line in run.record.lines)


def test_without_it_nothing_is_counted_and_where_all_groups_are_useful_it_changes_nothing(tmp_path):
    plain, _ = train(tmp_path, rounds=None, max_steps=2)
    assert not any(
        name.startswith("rollout/groups_dropped") for _, line in plain.record.lines for name in line
    )

    class Halves(Digits):
        is_accuracy = True

        def score(self, completions):
            return [float(b % 2) for b in range(len(completions))]

    runs = [train(tmp_path, [Halves()], rounds=rounds, max_steps=3)[0] for rounds in (None, 5)]
    assert same(runs[0].weights, runs[1].weights)
    assert runs[1].record.column("rollout/rounds") == [1, 1, 1]


def test_groups_are_judged_by_accuracy_and_not_by_the_reward(tmp_path):
    """A penalty on lengths tells rows apart that are all right; their groups are dropped all the same."""
    rewards = [Always(), OverlongPenalty(limit=8, buffer=8, weight=0.5)]
    run, watch = train(tmp_path, rewards, rounds=2, max_steps=1)
    event, drawn = watch.events[0]
    assert event.scores.rewards_B.view(4, 4).std(1).min() > 0
    assert len(drawn) == 2
    assert not event.experience.valid_B.any()
    assert run.record.lines[0][1]["rollout/groups_missing"] == 4


# --- rollouts that teach nothing -----------------------------------------------------------------------------------------

NOTHING = {
    "tokens": {"reduction": TokenMean()},
    "sequences": {"reduction": SequenceMean(), "bonus": EntropyBonus(0.01)},
    "constant": {
        "reduction": ConstantLength(8),
        "advantage": LeaveOneOut(),
        "kl": KLPenalty(ConstantCoefficient(0.1)),
    },
    "whitened": {"advantage": GroupRelative("batch")},
    "returns": {
        "advantage": ReturnToGo(),
        "kl": KLPenalty(ConstantCoefficient(0.1), "k1", "reward"),
    },
    "promising": {"support": TopK(3), "kl": KLPenalty(ConstantCoefficient(0.1), "exact")},
    "blocks": {
        "support": Nucleus(0.9, 6),
        "actions": BlockActions(FutureShare(0.2), length=3, source="mtp"),
        "upkeep": HeadUpkeep(0.1),
        "advantage": GeneralizedAdvantage(),
        "critic": ValueLoss(),
    },
}


def idle(folder: Path, case: str, **options):
    axes = NOTHING[case]
    heads = {"mtp": ParallelHeads(offsets=2)} if case == "blocks" else {}
    critic = {"critic": ValueHead()} if "critic" in axes else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        policy = make_policy(**heads, **critic)
        return train(folder, policy=policy, objective=make_objective(**axes), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOTHING)
def test_a_rollout_without_a_useful_group_changes_nothing(tmp_path, case):
    """Weights stay bit for bit, also under momentum and decay, and no metric is NaN."""
    before: list[dict[str, torch.Tensor]] = []

    def look(trainer, module, *_):
        before.append(
            {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
        )

    run, watch = idle(
        tmp_path,
        case,
        rewards=[Always()],
        rounds=2,
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_start=look), Watchdog(patience=9)],
        module={"optimizer": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1)},
        accumulate_grad_batches=2,
        max_steps=4,
    )
    assert [len(event.experience.valid_B) for event, _ in watch.events] == [16, 16]
    assert not any(event.experience.valid_B.any() for event, _ in watch.events)
    assert same(run.weights, before[0])
    assert len(run.record.lines) == 4
    for _, line in run.record.lines:
        assert all(value == value and abs(value) < 1e9 for value in line.values()), line
        assert line["optim/grad_norm"] == line["loss/surrogate"] == 0
        assert line["rollout/groups_missing"] == 4


@pytest.mark.filterwarnings("ignore")
def test_momentum_waits_for_an_update_that_teaches(tmp_path):
    """Two updates, an idle rollout of two, two more: the state of the optimiser is that before the idle ones."""

    class Turns(FewLow):
        def score(self, completions):
            self.calls = getattr(self, "calls", 0) + 1
            useful = [float(b % 2) for b in range(len(completions))]
            return [1.0] * len(completions) if self.calls == 2 else useful

    moments = []

    def look(trainer, *_):
        moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    run, _ = train(
        tmp_path,
        [Turns()],
        rounds=1,
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_batch_end=look)],
        module={"optimizer": adam(1e-2)},
        max_steps=6,
    )
    assert run.record.column("rollout/groups_missing") == [0, 0, 4, 4, 0, 0]
    steps = [state[0]["step"].item() for state in moments]
    assert steps == [1, 2, 2, 2, 3, 4]
    assert torch.equal(moments[1][0]["exp_avg"], moments[3][0]["exp_avg"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bonus", [None, EntropyBonus(0.1)])
def test_equal_rewards_are_counted_and_their_updates_skipped(tmp_path, bonus):
    """Without dynamic sampling, a rollout of equal rewards between two that teach: no weight moves, by momentum either.

    With an entropy bonus there is something to learn even then.
    """

    class Turns(FewLow):
        def score(self, completions):
            self.calls = getattr(self, "calls", 0) + 1
            useful = [float(b % 2) if b < 12 else 0.0 for b in range(len(completions))]
            return [1.0] * len(completions) if self.calls == 2 else useful

    weights = []

    def look(trainer, module, *_):
        weights.append(
            {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
        )

    run, _ = train(
        tmp_path,
        [Turns()],
        rounds=None,
        objective=make_objective(bonus=bonus),
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_batch_end=look)],
        module={"optimizer": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)},
        accumulate_grad_batches=2,
        max_steps=6,
    )
    assert run.record.column("rollout/groups_flat") == [0.25, 0.25, 1, 1, 0.25, 0.25]
    skipped = bonus is None
    assert run.record.column("optim/idle") == [0, 0, skipped, skipped, 0, 0]
    after = weights[1::2]  # of two micro-batches each
    assert same(after[1], after[2]) == same(after[2], after[3]) == skipped
    assert not same(after[3], after[4])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOTHING)
def test_places_that_stay_free_weigh_nothing(tmp_path, case):
    """Half of the groups are missing, so that some micro-batches have no row that counts: a cut changes no update."""

    class TwoGroups(FewLow):
        def score(self, completions):
            return [float(b % 2) if b < 8 else 0.0 for b in range(len(completions))]

    options = {
        "module": {"optimizer": sgd(0.01)},
        "max_steps": 1,
        "rewards": [TwoGroups()],
        "rounds": 1,
    }
    cut, watch = idle(tmp_path, case, **options, accumulate_grad_batches=4)
    whole, _ = idle(tmp_path, case, **options)
    (event, _), *_ = watch.events
    assert event.experience.valid_B.tolist() == [True] * 8 + [False] * 8

    start, _ = idle(tmp_path, case, **options | {"module": {"optimizer": sgd(0.0)}})
    assert distance(whole.weights, start.weights) > 1e-6
    assert distance(cut.weights, whole.weights) < 1e-6
    assert all(weight.isfinite().all() for weight in cut.weights.values())


# --- truncated responses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(), ConstantLength(8)], ids=["tokens", "rows", "length"]
)
def test_truncated_responses_carry_no_loss_while_their_rewards_count(tmp_path, reduction):
    seen = []

    def look(trainer, module, batch, batch_idx):
        seen.append((module.source.experience, batch["denominators"]))

    options = {
        "objective": make_objective(reduction=reduction),
        "callbacks": [Probe(on_train_batch_start=look)],
    }
    masked, _ = train(
        tmp_path, [Digits()], rounds=None, rollout={"mask_truncated": True}, max_steps=1, **options
    )
    plain, _ = train(tmp_path, [Digits()], rounds=None, max_steps=1, **options)
    (experience, denominators), (other, _) = seen
    whole_B = experience.rollout.finish_B == Finish.STOP
    assert 0 < whole_B.sum() < 16
    assert torch.equal(experience.rollout.tokens_BL, other.rollout.tokens_BL)
    assert torch.equal(experience.advantages_BT, other.advantages_BT), (
        "rewards of truncated responses count"
    )
    advantages_B = group_relative(
        torch.tensor(Digits().score(completions_of(experience.rollout))), 4
    )
    for b in range(16):
        mask = experience.rollout.response_mask_BT[b]
        assert experience.mask_BT[b].tolist() == (mask & whole_B[b]).tolist()
        torch.testing.assert_close(
            experience.advantages_BT[b][mask], advantages_B[b].expand(int(mask.sum()))
        )
    tokens = int(experience.rollout.response_mask_BT[whole_B].sum())
    expected = {
        TokenMean: tokens,
        SequenceMean: int(whole_B.sum()),
        ConstantLength: 8 * int(whole_B.sum()),
    }
    assert denominators.actions == denominators.tokens == expected[type(reduction)]
    assert distance(masked.weights, plain.weights) > 1e-4


def test_a_rollout_of_truncated_responses_alone_changes_nothing(tmp_path):
    class CutOff(LocalSampler):
        def sample(self, *arguments, **options):
            rollout = super().sample(*arguments, **options)
            return replace(rollout, finish_B=torch.full_like(rollout.finish_B, int(Finish.LENGTH)))

    def run(lr, **rollout):
        options = {"module": {"optimizer": adam(lr)}, "max_steps": 2, "rounds": None}
        return train(tmp_path, [Digits()], rollout={"sampler": CutOff(), **rollout}, **options)[0]

    still = run(0.0, mask_truncated=True).weights
    assert same(run(1e-2, mask_truncated=True).weights, still)
    assert not same(run(1e-2).weights, still)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [1, 4, 6], ids=lambda at: f"after{at}")
def test_a_run_goes_on_within_a_rollout_and_at_its_end(tmp_path, at):
    def run(folder, steps, ckpt_path=None):
        return train(
            folder,
            rounds=3,
            rollout={"minibatches": 2, "epochs": 2, "mask_truncated": True},
            objective=make_objective(
                support=Nucleus(0.9, 6), kl=KLPenalty(AdaptiveCoefficient(target=0.01))
            ),
            callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
            module={"optimizer": adam(3e-3)},
            accumulate_grad_batches=2,
            max_steps=steps,
            ckpt_path=ckpt_path,
        )[0]

    whole = run(tmp_path / "whole", 9)
    run(tmp_path, at)
    resumed = run(tmp_path, 9, f"{tmp_path}/last.ckpt")
    assert same(resumed.weights, whole.weights)
    assert resumed.record.without_clocks() == [
        line for line in whole.record.without_clocks() if line[0] >= at
    ]
    assert max(whole.record.column("rollout/rounds")) > 1
