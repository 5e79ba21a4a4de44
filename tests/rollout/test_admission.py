"""What a rollout must fulfil before it is trained on, whoever sampled it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.parity import check_parity
from tests.support.builders import VOCABULARY, make_rollout

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
    assert check_rollout(rollout, TopK(3), VOCABULARY) is rollout
    plain = make_rollout(PROMPTS, RESPONSES)
    assert check_rollout(plain, FullVocabulary(), VOCABULARY) is plain


def test_a_token_outside_its_support_is_refused_with_the_way_out():
    rollout = lacking(make_rollout(PROMPTS, RESPONSES, support=3), (0, 1), (3, 5))
    with pytest.raises(
        UserError, match=r"2 of 13 sampled tokens are not in the support .*`TopK.outside: unite`"
    ):
        check_rollout(rollout, TopK(3), VOCABULARY)


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("outside", ["unite", "drop"])
def test_in_tolerant_mode_supports_are_united_with_their_token(tiny_policy, slots, outside):
    whole = make_rollout(PROMPTS, RESPONSES, support=3, slots=slots)
    rollout = lacking(whole, (0, 1), (3, 5))
    united = check_rollout(rollout, TopK(3, outside=outside), VOCABULARY)
    assert united.outside_BT.nonzero().tolist() == [[0, 1], [3, 5]]
    assert united.support_BTK.shape[-1] == 4
    policy, mask = tiny_policy(), whole.response_mask_BT
    with torch.no_grad():
        scored = policy.score(united, mask, temperature=1.0).logprobs_BT
        before = policy.score(whole, mask, temperature=1.0).logprobs_BT
    kept = mask & ~united.outside_BT
    torch.testing.assert_close(
        scored[kept], before[kept]
    )  # where nothing was missing, nothing changed
    assert (scored[united.outside_BT] < 0).all()
    everything = [
        set(row[slot].tolist())
        for row, slot in zip(united.support_BTK[0], united.support_mask_BTK[0], strict=False)
    ]
    assert rollout.responses_BT[0, 1].item() in everything[1]
    assert len(everything[0]) <= 3


def test_tokens_behind_an_end_were_drawn_as_well():
    """A diffusion sampler scores them, so that they need supports and log-probs too."""
    rollout = make_rollout(PROMPTS, RESPONSES, support=3)
    T = rollout.response_mask_BT.shape[1]
    drawn = replace(rollout, reveal_BT=torch.arange(T).int().expand(len(rollout.group_B), T))
    place = (1, T - 1)
    assert not rollout.response_mask_BT[place]
    united = check_rollout(lacking(drawn, place), TopK(3, outside="unite"), VOCABULARY)
    assert united.outside_BT[place]
    logprobs = drawn.behaviour_logprobs_BT.clone()
    logprobs[place] = torch.nan
    broken = replace(drawn, behaviour_logprobs_BT=logprobs)
    with pytest.raises(UserError, match="got 1 of 24 sampled tokens with others"):
        check_rollout(broken, TopK(3, outside="unite"), VOCABULARY, behaviour=True)


def test_a_token_in_an_empty_slot_is_outside():
    rollout = make_rollout(PROMPTS, RESPONSES, support=3)
    hit = rollout.support_BTK == rollout.responses_BT[..., None]
    with pytest.raises(UserError, match="13 of 13 sampled tokens"):
        check_rollout(replace(rollout, support_mask_BTK=~hit), TopK(3), VOCABULARY)


def test_the_parity_gate_says_nothing_of_tokens_that_were_outside(tiny_policy):
    whole = make_rollout(PROMPTS, RESPONSES, support=3)
    policy = tiny_policy()
    with torch.no_grad():
        scored = policy.score(whole, whole.response_mask_BT, temperature=1.0).logprobs_BT
    rollout = replace(lacking(whole, (0, 1)), behaviour_logprobs_BT=scored)
    united = check_rollout(rollout, TopK(3, outside="unite"), VOCABULARY)
    united.behaviour_logprobs_BT[0, 1] = -30.0
    assert check_parity(policy, united, temperature=1.0, exact=True).max < 1e-4
    united.behaviour_logprobs_BT[0, 0] = -30.0
    with pytest.raises(UserError, match="sampler and trainer disagree"):
        check_parity(policy, united, temperature=1.0, exact=True)


@pytest.mark.parametrize(
    ("change", "support", "message"),
    [
        (
            {},
            FullVocabulary(),
            "`objective.support` is FullVocabulary, so that every ratio would carry the mass",
        ),
        (
            {"support_BTK": None},
            TopK(3),
            "the rollout stores no supports, but `objective.support` is TopK",
        ),
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
        check_rollout(rollout, support, VOCABULARY)


def test_ids_in_padding_and_empty_slots_are_never_read():
    rollout = make_rollout(PROMPTS, RESPONSES, support=3, slots=True)
    used = rollout.support_mask_BTK & rollout.response_mask_BT[..., None]
    wild = replace(rollout, support_BTK=rollout.support_BTK.masked_fill(~used, 10**6))
    assert check_rollout(wild, TopK(3), VOCABULARY) is wild


def recorded(support: int | None = None):
    """Return a rollout with two candidates a step, of which the second one is the sampled token."""
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    tokens = rollout.responses_BT
    other = (tokens + 1) % VOCABULARY
    if support:  # another id of the support
        own = rollout.support_BTK == tokens[..., None]
        other = rollout.support_BTK.gather(2, own.int().argmin(-1, keepdim=True))[..., 0].long()
    logprobs = torch.tensor([-1.5, -0.7]).expand(*tokens.shape, 2).clone()
    behaviour = torch.where(rollout.response_mask_BT, logprobs[..., 1], 0.0)
    ids = torch.stack([other, tokens], -1).int()
    return replace(
        rollout,
        candidates_BTK=ids,
        candidate_logprobs_BTK=logprobs,
        behaviour_logprobs_BT=behaviour,
    )


def put(values, value):
    """Change one response token's entry of a copy."""
    copy = values.clone()
    copy[3, 5] = value
    return copy


@pytest.mark.parametrize(("support", "k"), [(FullVocabulary(), None), (TopK(3), 3)])
def test_a_rollout_with_candidates_passes_unchanged(support, k):
    rollout = recorded(k)
    assert check_rollout(rollout, support, VOCABULARY, behaviour=True, candidates=1) is rollout


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "got 1 of 13 sampled tokens with others"),
        (-float("inf"), "must hold log-probs, finite and at most 0"),
        (0.01, "were logits or probabilities recorded"),
        (None, "the rollout has no `behaviour_logprobs_BT`"),
    ],
)
def test_log_probs_of_the_sampler_are_checked_where_they_are_used(value, message):
    rollout = make_rollout(PROMPTS, RESPONSES)
    before = rollout.behaviour_logprobs_BT
    rollout = replace(rollout, behaviour_logprobs_BT=None if value is None else put(before, value))
    assert check_rollout(rollout, FullVocabulary(), VOCABULARY) is rollout
    with pytest.raises(UserError, match=message) as refusal:
        check_rollout(rollout, FullVocabulary(), VOCABULARY, behaviour=True)
    assert "\n" not in str(refusal.value)


def test_log_probs_in_padding_and_by_rounding_pass():
    rollout = make_rollout(PROMPTS, RESPONSES)
    logprobs = put(rollout.behaviour_logprobs_BT, 5e-5).masked_fill(
        ~rollout.response_mask_BT, torch.nan
    )
    check_rollout(
        replace(rollout, behaviour_logprobs_BT=logprobs),
        FullVocabulary(),
        VOCABULARY,
        behaviour=True,
    )


NO_CANDIDATES = {
    "missing": (
        lambda r: {"candidates_BTK": None},
        "the rollout has no `candidates_BTK` with log-probs",
    ),
    "no logprobs": (
        lambda r: {"candidate_logprobs_BTK": None},
        "of which `objective.surrogate` compares 1",
    ),
    "nan": (
        lambda r: {"candidate_logprobs_BTK": put(r.candidate_logprobs_BTK, torch.nan)},
        "or -inf in slots",
    ),
    "positive": (
        lambda r: {"candidate_logprobs_BTK": put(r.candidate_logprobs_BTK, 0.5)},
        "must hold log-probs",
    ),
    "ids": (
        lambda r: {"candidates_BTK": put(r.candidates_BTK, VOCABULARY)},
        "the candidates of the rollout hold ids",
    ),
    "twice": (lambda r: {"candidates_BTK": put(r.candidates_BTK, 3)}, "must hold distinct ids"),
    "not the token": (
        lambda r: {
            "candidate_logprobs_BTK": put(
                r.candidate_logprobs_BTK, torch.tensor([-1.0, -torch.inf])
            )
        },
        "1 of 13 sampled tokens are not among their `candidates_BTK`",
    ),
    "two stories": (
        lambda r: {
            "candidate_logprobs_BTK": put(r.candidate_logprobs_BTK, torch.tensor([-1.0, -0.9]))
        },
        "differ by up to 0.2 nats for the same token",
    ),
}


@pytest.mark.parametrize("case", NO_CANDIDATES)
def test_candidates_with_which_no_divergence_could_be_taken_are_refused(case):
    change, message = NO_CANDIDATES[case]
    rollout = replace(recorded(), **change(recorded()))
    assert check_rollout(rollout, FullVocabulary(), VOCABULARY, behaviour=True) is rollout
    with pytest.raises(UserError, match=message) as refusal:
        check_rollout(rollout, FullVocabulary(), VOCABULARY, candidates=1)
    assert "\n" not in str(refusal.value)


def test_candidates_outside_the_stored_support_are_refused():
    rollout = recorded(3)
    free = next(v for v in range(VOCABULARY) if v not in rollout.support_BTK[3, 5].tolist())
    ids = put(
        rollout.candidates_BTK, torch.stack([torch.tensor(free), rollout.responses_BT[3, 5]]).int()
    )
    with pytest.raises(UserError, match="`candidates_BTK` must be ids of the stored support"):
        check_rollout(replace(rollout, candidates_BTK=ids), TopK(3), VOCABULARY, candidates=1)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            [0, 0, 1, 1, 1, 1],
            r"the rollout has groups of \[2, 4\] rows; .* the 3 completions \(`rollout.completions`\)",
        ),
        (
            [0, 1, 0, 1, 0, 1],
            "the rollout has rows of one prompt apart from each other; .* of a prompt below each other",
        ),
        ([0, 0, 1, 1, 2, 2], r"the rollout has groups of \[2\] rows"),
    ],
)
def test_groups_that_an_advantage_would_mix_up_are_refused(group, message):
    rollout = make_rollout([3, 5], [2] * 6)
    assert check_rollout(rollout, FullVocabulary(), VOCABULARY, completions=3) is rollout
    with pytest.raises(UserError, match=message):
        check_rollout(
            replace(rollout, group_B=torch.tensor(group)),
            FullVocabulary(),
            VOCABULARY,
            completions=3,
        )
