"""Noise travels with its rows: into micro-batches, plans, checkpoints and joined rollouts."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.likelihoods import Elbo
from lightning_mpo.rollout import join_rollouts
from lightning_mpo.rollout.noised import with_noise
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.state import RolloutBuffer
from lightning_mpo.types import NEVER, Rollout, take_rows, trim
from tests.support.builders import seeded
from tests.support.masked_rollouts import (
    ENDS,
    LIKELIHOODS,
    judged,
    masked_objective,
    masked_rollout,
    noised,
)

each = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
B, T, PASSES = len(ENDS), 8, 2


@each
def test_a_micro_batch_takes_its_noise_along_and_keeps_the_canvas(likelihood):
    made = noised(likelihood, passes=PASSES)
    short = made.rollout.group_B == 0  # prompts of three tokens, padded to five
    rows = short.nonzero()[:3, 0]
    part = trim(take_rows(made, rows)).rollout
    assert part.hidden_BCL is not None
    assert made.rollout.hidden_BCL is not None
    assert part.tokens_BL.shape == (3, 3 + T)
    assert torch.equal(part.hidden_BCL, made.rollout.hidden_BCL[rows][..., 2:])
    for name in ("copy_weights_BCT", "reveal_BT", "reveal_entropy_BT", "response_mask_BT"):
        assert torch.equal(getattr(part, name), getattr(made.rollout, name)[rows]), name


@each
def test_a_plan_has_all_rows_of_a_response_in_one_update(likelihood):
    schedule = Schedule(2, 3, minibatches=2, epochs=PASSES, copies=likelihood.repeats)
    made = noised(likelihood, passes=PASSES)
    group_B = made.rollout.group_B[: schedule.rows]
    plan = schedule.plan(group_B, torch.full((schedule.rows,), 13), seeded(0))
    assert len(plan) == schedule.updates
    rows = [torch.cat(update) for update in plan]
    assert torch.cat(rows).sort().values.tolist() == list(range(PASSES * schedule.rows))
    for number, update in enumerate(rows):
        assert set((update // schedule.rows).tolist()) == {number // 2}, "a pass has its own rows"
        counts = (update // likelihood.repeats).unique(return_counts=True)[1]
        assert set(counts.tolist()) == {likelihood.repeats}


@each
def test_a_checkpoint_holds_the_noise(likelihood, tmp_path):
    schedule = Schedule(2, 3, minibatches=2, epochs=PASSES, copies=likelihood.repeats)
    made = noised(likelihood, passes=PASSES)
    plan = schedule.plan(
        made.rollout.group_B[: schedule.rows], torch.full((schedule.rows,), 13), seeded(0)
    )
    subject = masked_objective(likelihood)
    buffer = RolloutBuffer(
        made, plan, [subject.denominators(take_rows(made, torch.cat(u))) for u in plan]
    )
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    again = RolloutBuffer.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for update in range(schedule.updates):
        one, other = (b.micro_batch(update, 0) for b in (buffer, again))
        for item in fields(Rollout):
            a, b = getattr(one.rollout, item.name), getattr(other.rollout, item.name)
            same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
            assert same, item.name


def test_noise_of_another_kind_is_refused():
    state = RolloutBuffer(
        noised(Elbo(samples=2), passes=PASSES), [[torch.arange(2 * 2 * B)]], []
    ).state_dict()
    rollout = state["experience"]["rollout"]
    wrong = {
        "hidden_BCL": (rollout["hidden_BCL"].float(), "of torch.float32, not torch.bool"),
        "copy_weights_BCT": (rollout["copy_weights_BCT"][:, 0], "has 2 dimensions"),
        "reveal_BT": (rollout["reveal_BT"][1:], "rows, not"),
    }
    for name, (value, message) in wrong.items():
        broken = dict(state, experience=dict(state["experience"], rollout=rollout | {name: value}))
        with pytest.raises(TypeError, match=f"`{name}` of the rollout .*{message}"):
            RolloutBuffer.from_state(broken)


def test_rollouts_of_several_rounds_join_with_their_steps():
    first, second = masked_rollout(), masked_rollout([2, None], prompts=[7], seed=3)
    whole = join_rollouts([first, second])
    assert whole.reveal_BT is not None
    for name in ("reveal_BT", "reveal_entropy_BT", "behaviour_logprobs_BT", "response_mask_BT"):
        parts = [getattr(part, name) for part in (first, second)]
        assert torch.equal(getattr(whole, name), torch.cat(parts)), name
    assert whole.attention_mask_BL[:, 7:].all()
    assert whole.group_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_noise_joins_as_well_and_a_shorter_canvas_was_never_revealed():
    first = noised(Elbo(samples=1), passes=1).rollout
    second = with_noise(
        judged(masked_rollout([2, None], prompts=[7], canvas=4)), Elbo(1), seeded(1), passes=1
    ).rollout
    whole = join_rollouts([first, second])
    assert whole.hidden_BCL is not None
    assert whole.reveal_BT is not None
    assert second.hidden_BCL is not None
    assert torch.equal(whole.hidden_BCL[:B, :, 2:], first.hidden_BCL)
    assert torch.equal(whole.hidden_BCL[B:, :, :11], second.hidden_BCL)
    assert (whole.reveal_BT[B:, 4:] == NEVER).all()
