"""Admission, parity and metrics of rollouts that a masked policy revealed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.rollout.parity import ParityError, check_parity
from lightning_mpo.types import NEVER, Experience, Rollout
from tests.support.builders import END, PAD
from tests.support.masked_table import MASK, MaskedTable
from tests.support.revealed import G, T, reveal

POLICY, ENDING = MaskedTable(), MaskedTable(end=6.0)
SUPPORTS = [FullVocabulary(), TopK(4), Nucleus(0.8, 6)]


def admit(rollout: Rollout, support=SUPPORTS[0]) -> Rollout:
    return check_rollout(
        rollout, support, POLICY.vocabulary, True, completions=G, barred=POLICY.barred
    )


# --- admission --------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", SUPPORTS)
def test_rollouts_of_the_sampler_are_admitted(support):
    for policy in (POLICY, ENDING):
        rollout = reveal(policy, support=support)
        assert admit(rollout, support) is rollout


@pytest.mark.parametrize("id", [PAD, MASK])
def test_mask_and_padding_in_a_response_are_refused(id):
    rollout = reveal(ENDING)
    S = rollout.prompt_length
    for place in ((0, 0), tuple((rollout.reveal_BT != NEVER).nonzero()[-1].tolist())):
        tokens = rollout.tokens_BL.clone()
        tokens[place[0], S + place[1]] = id
        with pytest.raises(UserError, match=f"1 response tokens .* probability 0 .* id {id}: MASK"):
            admit(replace(rollout, tokens_BL=tokens))
    # behind an early end nothing was drawn
    b, t = (rollout.reveal_BT == NEVER).nonzero()[-1].tolist()
    tokens = rollout.tokens_BL.clone()
    tokens[b, S + t] = id
    admit(replace(rollout, tokens_BL=tokens))


def test_a_support_that_holds_mask_is_refused_in_used_slots():
    rollout = reveal(POLICY, support=Nucleus(0.5, 6))
    assert not rollout.support_mask_BTK.all()
    b, t, k = (~rollout.support_mask_BTK).nonzero()[0].tolist()
    support = rollout.support_BTK.clone()
    support[b, t, k] = MASK
    empty = replace(rollout, support_BTK=support)
    admit(empty, Nucleus(0.5, 6))
    used = replace(empty, support_mask_BTK=torch.ones_like(rollout.support_mask_BTK))
    with pytest.raises(UserError, match=f"supports .* such as {MASK}: let the support leave MASK"):
        admit(used, Nucleus(0.5, 6))


# --- the parity gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("policy", [POLICY, ENDING], ids=["long", "ending"])
def test_sampler_and_trainer_agree(policy, support, temperature):
    for remasking, count in (("low_confidence", 2), ("random", 1)):
        rollout = reveal(
            policy, support=support, temperature=temperature, remasking=remasking,
            tokens_per_step=count,
        )  # fmt: skip
        parity = check_parity(policy, rollout, temperature=temperature, exact=True)
        assert parity.max < 1e-4


@pytest.mark.parametrize(("sampler", "trainer"), [(0.7, 1.0), (1.0, 0.7), (1.5, 1.0)])
def test_another_temperature_is_named(sampler, trainer):
    rollout = reveal(POLICY, temperature=sampler)
    with pytest.raises(ParityError) as caught:
        check_parity(POLICY, rollout, temperature=trainer, exact=True)
    assert f"the sampler used temperature {sampler}, the trainer {trainer}" in str(caught.value)


def test_a_support_on_one_side_is_named():
    rollout = reveal(POLICY, support=TopK(4))
    dropped = replace(rollout, support_BTK=None, support_mask_BTK=None)
    with pytest.raises(ParityError, match="a truncated support that the trainer does not apply"):
        check_parity(POLICY, dropped, temperature=1.0, exact=True)


def test_steps_of_another_order_are_refused():
    rollout = reveal(POLICY)
    shifted = replace(rollout, reveal_BT=(T - 1 - rollout.reveal_BT).int())
    with pytest.raises(ParityError, match="sampler and trainer disagree"):
        check_parity(POLICY, shifted, temperature=1.0, exact=True)
    with pytest.raises(UserError, match="must record at which step it revealed each token"):
        check_parity(POLICY, replace(rollout, reveal_BT=None), temperature=1.0, exact=True)


# --- metrics ----------------------------------------------------------------------------------------


def event(rollout: Rollout) -> RolloutEvent:
    B = len(rollout.group_B)
    ones_B, zeros_BT = torch.ones(B), torch.zeros(rollout.response_mask_BT.shape)
    experience = Experience(rollout, ones_B, ones_B.bool(), zeros_BT, zeros_BT)
    yes_B = ones_B.bool()
    scores = Scores(ones_B, yes_B, yes_B, yes_B, {}, yes_B)
    return RolloutEvent(0, experience, scores, 0.0, 0.0)


def test_responses_without_a_token_before_the_end_are_counted():
    rollout = reveal(MaskedTable(end=3.5))
    empty = sum(row[0] == END for row in rollout.responses_BT.tolist())
    assert 0 < empty < len(rollout.rows)
    sums = event(rollout).sums([END])
    assert sums["rollout/empty"] == (empty, len(rollout.rows))
    assert "rollout/empty" not in event(replace(rollout, reveal_BT=None)).sums([END])
