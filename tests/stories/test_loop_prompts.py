"""Each rollout is drawn from the policy as it is then, with the prompts of its counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.objective.supports import TopK
from tests.support.runs import Probe, adam, fit, make_data, make_objective


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
