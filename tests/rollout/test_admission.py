"""What a rollout must fulfil before it is trained on, whoever sampled it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.rollout.admission import admit
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.supports import FullVocabulary, TopK
from tests.helpers import VOCABULARY, make_rollout

PROMPTS, RESPONSES = [3, 5], [4, 1, 2, 6]


def lacking(rollout, *places):
    """Put another id into the slot of the sampled token at some places."""
    support = rollout.support_BTK.clone()
    for b, t in places:
        token = rollout.responses_BT[b, t]
        free = next(v for v in range(VOCABULARY) if v not in support[b, t].tolist())
        support[b, t][support[b, t] == token] = free
    return replace(rollout, support_BTK=support)


@pytest.mark.parametrize("slots", [True, False])
def test_a_rollout_of_the_objective_s_kind_passes_unchanged(slots):
    rollout = make_rollout(PROMPTS, RESPONSES, support=3, slots=slots)
    assert admit(rollout, TopK(3), VOCABULARY) is rollout
    plain = make_rollout(PROMPTS, RESPONSES)
    assert admit(plain, FullVocabulary(), VOCABULARY) is plain


def test_a_token_outside_its_support_is_refused_with_the_way_out():
    rollout = lacking(make_rollout(PROMPTS, RESPONSES, support=3), (0, 1), (3, 5))
    with pytest.raises(UserError, match=r"2 of 13 sampled tokens are not in the support .*`TopK.outside: unite`"):
        admit(rollout, TopK(3), VOCABULARY)


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("outside", ["unite", "drop"])
def test_in_tolerant_mode_supports_are_united_with_their_token(tiny_policy, slots, outside):
    whole = make_rollout(PROMPTS, RESPONSES, support=3, slots=slots)
    rollout = lacking(whole, (0, 1), (3, 5))
    united = admit(rollout, TopK(3, outside=outside), VOCABULARY)
    assert united.outside_BT.nonzero().tolist() == [[0, 1], [3, 5]]
    assert united.support_BTK.shape[-1] == 4
    policy, mask = tiny_policy(), whole.response_mask_BT
    with torch.no_grad():
        scored = policy.score(united, mask, temperature=1.0).logprobs_BT
        before = policy.score(whole, mask, temperature=1.0).logprobs_BT
    kept = mask & ~united.outside_BT
    torch.testing.assert_close(scored[kept], before[kept])  # where nothing was missing, nothing changed
    assert (scored[united.outside_BT] < 0).all()
    everything = [set(row[slot].tolist()) for row, slot in zip(united.support_BTK[0], united.support_mask_BTK[0])]  # noqa: B905
    assert rollout.responses_BT[0, 1].item() in everything[1]
    assert len(everything[0]) <= 3


def test_a_token_in_an_empty_slot_is_outside():
    rollout = make_rollout(PROMPTS, RESPONSES, support=3)
    hit = rollout.support_BTK == rollout.responses_BT[..., None]
    with pytest.raises(UserError, match="13 of 13 sampled tokens"):
        admit(replace(rollout, support_mask_BTK=~hit), TopK(3), VOCABULARY)


def test_the_parity_gate_says_nothing_of_tokens_that_were_outside(tiny_policy):
    whole = make_rollout(PROMPTS, RESPONSES, support=3)
    policy = tiny_policy()
    with torch.no_grad():
        scored = policy.score(whole, whole.response_mask_BT, temperature=1.0).logprobs_BT
    rollout = replace(lacking(whole, (0, 1)), behaviour_logprobs_BT=scored)
    united = admit(rollout, TopK(3, outside="unite"), VOCABULARY)
    united.behaviour_logprobs_BT[0, 1] = -30.0
    assert check_parity(policy, united, temperature=1.0, exact=True).max < 1e-4
    united.behaviour_logprobs_BT[0, 0] = -30.0
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check_parity(policy, united, temperature=1.0, exact=True)


@pytest.mark.parametrize(
    ("change", "support", "message"),
    [
        ({}, FullVocabulary(), "`objective.support` is FullVocabulary, so that every ratio would carry the mass"),
        ({"support_BTK": None}, TopK(3), "the rollout stores no supports, but `objective.support` is TopK"),
        (
            {"support_BTK": torch.full((4, 6, 3), VOCABULARY)},
            TopK(3),
            "the supports of the rollout hold ids from .* another tokenizer",
        ),
        (
            {"tokens_BL": torch.full((4, 11), VOCABULARY)},
            TopK(3),
            "the tokens of the rollout hold ids from .* another tokenizer",
        ),
    ],
    ids=["unexpected", "missing", "support ids", "token ids"],
)
def test_what_does_not_fit_is_refused(change, support, message):
    rollout = replace(make_rollout(PROMPTS, RESPONSES, support=3), **change)
    with pytest.raises(UserError, match=message):
        admit(rollout, support, VOCABULARY)


def test_ids_in_padding_and_empty_slots_are_never_read():
    rollout = make_rollout(PROMPTS, RESPONSES, support=3, slots=True)
    used = rollout.support_mask_BTK & rollout.response_mask_BT[..., None]
    wild = replace(rollout, support_BTK=rollout.support_BTK.masked_fill(~used, 10**6))
    assert admit(wild, TopK(3), VOCABULARY) is wild
