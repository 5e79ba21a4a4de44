"""Gradients of the trunk by offset against plain autograd over losses that are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.functional.head_diagnostics import gradient_parts
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.future_credit import StateCredit
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.policies import CausalPolicy, Lora, MedusaHeads, ParallelHeads, SequentialHeads
from lightning_mpo.rollout.head_measures import HeadMeasures, rows_with_credit
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import Experience
from tests.support.builders import make_rollout, seeded
from tests.support.mtp import scramble

M, SHARE = 2, 0.4
BETAS = [1 - SHARE, SHARE / 2, SHARE / 2]
RESPONSES = [5, 3, 1, 4, 2, 6]


def measures(policy, **options) -> HeadMeasures:
    return HeadMeasures(Scorer(policy, **options), policy, M)


def objective(credit: StateCredit | None) -> Objective:
    actions = BlockActions(FutureShare(SHARE), source="mtp", credit=credit)
    return Objective(actions=actions, reduction=TokenMean())


def experience(credit: bool, **options) -> Experience:
    """Return rows whose advantages differ from token to token; one row means nothing."""
    rollout = make_rollout([4, 6], RESPONSES, left=1, **options)
    mask_BT, draw = rollout.response_mask_BT, seeded(3)
    own_BT, later_BT = (torch.randn(mask_BT.shape, generator=draw) * mask_BT for _ in range(2))
    return Experience(
        rollout=rollout,
        rewards_B=torch.zeros(len(mask_BT)),
        valid_B=torch.tensor([True, True, True, True, False, True]),
        advantages_BT=own_BT,
        token_weights_BT=mask_BT.float(),
        future_advantages_BT=later_BT if credit else None,
    )


def by_hand(policy: CausalPolicy, batch: Experience, negatives: str) -> Tensor:
    """Return `gradient_parts` from three losses that are written out, through `.grad`."""
    weights = policy.parts()["policy"]
    mask_BT = batch.mask_BT
    own_BT = later_BT = batch.advantages_BT
    if batch.future_advantages_BT is not None:
        later_BT = batch.future_advantages_BT
    gradients = []
    for part in ("own", "later", "entropy"):
        scores = policy.score(
            batch.rollout, mask_BT, temperature=1.0, request=ScoreRequest(future=M)
        )
        loss = -(own_BT * mask_BT * scores.logprobs_BT).sum()
        if part != "own":
            loss = torch.zeros(())
        for n in range(1, M + 1) if part != "own" else ():
            factor_BT = torch.ones_like(later_BT) if part == "entropy" else later_BT
            q_BT = scores.future_BTM[..., n - 1]
            if negatives == "bound" and part == "later":
                ratio_BT = (q_BT - shift_left(scores.logprobs_BT, n)).exp().clamp(max=1).detach()
                factor_BT = torch.where(later_BT < 0, later_BT * ratio_BT, later_BT)
            alive_BT = window(mask_BT, n)
            loss = loss - BETAS[n] * (factor_BT * alive_BT * q_BT).sum()
        if part == "own":
            loss = BETAS[0] * loss
        if loss.requires_grad:
            loss.backward()
        gradients.append([weight.grad for weight in weights])
        policy.zero_grad(set_to_none=True)
    return gradient_parts(*gradients)


CASES = {
    "one advantage": (False, {}, {}),
    "an advantage of later tokens": (True, {}, {}),
    "a support": (True, {}, {"support": 6}),
    "a detached trunk": (True, {"detach_trunk": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [ParallelHeads, SequentialHeads, MedusaHeads])
@pytest.mark.parametrize("piece", [2, 6])
def test_gradient_parts_are_those_of_losses_written_out(tiny_policy, family, case, piece):
    credit, options, rows = CASES[case]
    policy = tiny_policy(mtp=family(offsets=M, **options), double=True)
    scramble(policy.mtp)
    batch = experience(credit, **rows)
    made = objective(StateCredit("bound") if credit else None)
    found = measures(policy).gradients(made, batch, piece)
    assert all(weight.grad is None for weight in policy.parameters())
    expected = by_hand(policy, batch, "bound" if credit else "keep")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found[0] > 0.05


@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
def test_a_detached_trunk_gets_a_gradient_through_the_shared_unembedding_alone(tiny_policy, own):
    """Parallel heads also share the final norm."""
    heads = MedusaHeads(offsets=M, own_unembedding=own, detach_trunk=True)
    policy = tiny_policy(mtp=heads, double=True)
    future, spurious = measures(policy).gradients(objective(None), experience(False), 6).tolist()
    assert (future == spurious == 0) == own


def test_only_adapters_count_with_adapters_and_checkpointing_changes_nothing(tiny_folder):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        policy = CausalPolicy(
            tiny_folder,
            lora=Lora(rank=2, alpha=4),
            mtp=ParallelHeads(offsets=M),
            gradient_checkpointing=checkpointing,
        )
        policy.build(device=torch.device("cpu"), reference=False)
        draw = seeded(2)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_" in name:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
        scramble(policy.mtp, 0.1)
        values = measures(policy).gradients(objective(None), experience(False), 4)
        torch.testing.assert_close(
            values, by_hand(policy, experience(False), "keep"), rtol=1e-3, atol=1e-5
        )
        found.append(values)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_rows_without_an_advantage_have_no_parts(tiny_policy):
    policy = tiny_policy(mtp=ParallelHeads(offsets=M))
    batch = experience(False)
    flat = replace(batch, advantages_BT=torch.zeros_like(batch.advantages_BT))
    assert measures(policy).gradients(objective(None), flat, 6).isnan().all()


@pytest.mark.parametrize(
    ("most", "rows"), [(1, [3]), (3, [3, 4, 5]), (5, [3, 4, 5]), (6, [3, 4, 5, 9, 10, 11]), (99, [3, 4, 5, 9, 10, 11])]
)  # fmt: skip
def test_rows_are_whole_groups_that_learn(most, rows):
    group_B = torch.arange(4).repeat_interleave(3)
    rollout = replace(make_rollout([3] * 4, [2] * 12), group_B=group_B)
    advantages_BT = torch.zeros(12, 2)
    advantages_BT[5, 1] = 1.0
    batch = Experience(
        rollout, torch.zeros(12), torch.ones(12).bool(), advantages_BT, torch.ones(12, 2),
        future_advantages_BT=torch.zeros(12, 2),
    )  # fmt: skip
    batch.future_advantages_BT[9, 0] = -1.0
    assert rows_with_credit(batch, most).tolist() == rows
