"""A Collector makes the rollouts of a run, without a trainer."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.rewards.scoring import Scores, completions_of, score_all
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.rollout.collect import Collector
from lightning_mpo.rollout.events import Listener
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.sampling import LocalSampler
from tests.support.bigram import BigramPolicy, BigramSampler
from tests.support.dynamic import FewLow
from tests.support.runs import Digits, fit, make_data, make_objective, make_policy
from tests.support.two_prompts import TwoPrompts

CLOCKS = ("time/", "throughput/")


class Notes(Listener):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.phases, self.lines, self.drawn = [], [], 0

    def phase(self, name):
        self.phases.append(name)

    def tokens(self, drawn, running):
        self.drawn += drawn

    def note(self, line):
        self.lines.append(line)


def same(one, other) -> bool:
    """Return whether two dataclasses of tensors are equal bit for bit."""
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if isinstance(a, Tensor):
            equal = a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        else:
            equal = same(a, b) if hasattr(a, "__dataclass_fields__") else a == b
        if not equal:
            return False
    return True


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


CASES = {
    "plain": ({}, {"minibatches": 2}, Digits()),
    "supports and a reference": (
        {"support": TopK(4), "terms": [KLPenalty(ConstantCoefficient(0.1))]},
        {"epochs": 2},
        Digits(),
    ),
    "dynamic": ({}, {"dynamic": DynamicSampling(4), "mask_truncated": True}, FewLow()),
}


@pytest.mark.parametrize("case", CASES)
def test_it_makes_the_rollouts_of_a_run_bit_for_bit(tmp_path, case):
    axes, options, reward = CASES[case]
    objective = make_objective(**axes)
    updates = options.get("minibatches", 1) * options.get("epochs", 1)
    run = fit(
        tmp_path,
        objective=objective,
        rollout={"rewards": [reward], "seed": 3, **options},
        module={"optimizer": still},
        max_steps=2 * updates,
    )
    policy, data, notes = make_policy(), make_data(), Notes()
    policy.build(device=torch.device("cpu"), reference=objective.needs_reference)
    data.connect(policy.tokenizer)
    dynamic = options.get("dynamic")
    collector = Collector(
        scorer=Scorer(policy),
        objective=make_objective(**axes),
        prompts=data,
        sampler=LocalSampler(),
        judge=lambda rollout: score_all([reward], completions_of(rollout)),
        schedule=Schedule(
            4, 4, minibatches=options.get("minibatches", 1), epochs=options.get("epochs", 1)
        ),
        max_new_tokens=8,
        seed=3,
        listener=notes,
        dynamic=None if dynamic is None else DynamicSampling(dynamic.rounds),
        mask_truncated=options.get("mask_truncated", False),
    )
    reference = objective.needs_reference
    _, second = (collector.collect(counter, reference=reference) for counter in (0, 1))
    assert same(second.experience, run.rollout.experience)
    flat = partial(map, torch.Tensor.tolist)
    assert [list(flat(update)) for update in second.plan] == [
        list(flat(update)) for update in run.rollout._buffer.plan
    ]
    assert all(
        same(a, b)
        for a, b in zip(second.denominators, run.rollout._buffer.denominators, strict=True)
    )
    logged = [run.record.column(name)[-1] for name in second.metrics]
    assert logged == pytest.approx(list(second.metrics.values()), nan_ok=True, rel=1e-6)
    assert [line.split()[0] for line in notes.lines] == ["parity"], "once"
    assert {"sampling", "reward function", "scoring", "all-reduce"} == set(notes.phases)
    assert notes.drawn > 0


def test_the_way_from_prompts_to_updates_imports_no_lightning():
    from pathlib import Path

    import lightning_mpo.rollout

    for path in Path(lightning_mpo.rollout.__file__).parent.glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [
            line
            for line in lines
            if line.startswith(("import lightning ", "import lightning.", "from lightning."))
        ]


def test_the_deviation_of_large_rewards_is_that_of_their_differences():
    """-1e9 and -1e9 + 1 differ by 1; the difference of their squares' means is below the rounding of 1e18."""
    policy = BigramPolicy()

    def judge(rollout):
        rewards_B = -1e9 + (torch.arange(8) % 2).double()
        judged_B = torch.ones(8, dtype=torch.bool)
        return Scores(rewards_B, judged_B, judged_B, judged_B, {"large": rewards_B}, judged_B)

    collector = Collector(
        Scorer(policy), make_objective(), TwoPrompts(), BigramSampler(), judge, Schedule(2, 4), 6
    )
    collected = collector.collect(0)
    assert collected.metrics["reward/std"] == pytest.approx(
        (torch.arange(8) % 2).double().std().item(), rel=1e-6
    )
    assert collected.metrics["rollout/groups_flat"] == 0
    sizes = collected.experience.advantages_BT.abs().amax(1)
    assert torch.allclose(sizes, sizes[0].expand(8)), "advantages see the differences"
    assert sizes[0] > 0.5
