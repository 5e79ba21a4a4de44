"""The diffusion sampler reveals what a loop over single rows reveals, step by step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, Support, TopK
from lightning_mpo.types import take_rows
from tests.support.builders import END, PAD, make_prompts, seeded
from tests.support.masked_table import MASK, MaskedTable
from tests.support.revealed import BLOCK, PROMPTS, G, T, naive_row, reveal, state_before

POLICY, ENDING = MaskedTable(), MaskedTable(end=6.0)
REMASKINGS = ["low_confidence", "random", "entropy"]
OPTIONS = {
    "low_confidence": {},
    "cold": {"temperature": 0.5, "tokens_per_step": 2},
    "hot": {"temperature": 2.0, "support": TopK(5)},
    "random": {"remasking": "random", "tokens_per_step": 2, "temperature": 1.5},
    "entropy": {"remasking": "entropy", "support": Nucleus(0.8, 6), "temperature": 0.7},
    "greedy": {"greedy": True, "tokens_per_step": 2},
    "greedy entropy": {"greedy": True, "remasking": "entropy", "support": TopK(4)},
    "whole block": {"tokens_per_step": BLOCK, "block": BLOCK},
    "one block": {"block": T, "tokens_per_step": 3},
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def full(options: dict) -> dict:
    defaults = {"tokens_per_step": 1, "block": BLOCK, "remasking": "low_confidence"}
    return defaults | {"greedy": False, "support": FullVocabulary(), "temperature": 1.0} | options


def prompt_of(rollout, b):
    S = rollout.prompt_length
    return rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]


@each_option
@pytest.mark.parametrize("policy", [POLICY, ENDING], ids=["long", "ending"])
def test_rows_are_those_of_a_loop_over_single_rows(name, policy):
    options = full(OPTIONS[name])
    rollout, g = reveal(policy, **options), seeded(0)
    steps, shape = T // options["tokens_per_step"], (len(PROMPTS) * G, options["block"])
    is_random = options["remasking"] == "random"
    uniform, order = zip(
        *(
            (torch.rand(shape, generator=g), torch.rand(shape, generator=g) if is_random else None)
            for _ in range(steps)
        ),
        strict=True,
    )
    for b in range(len(PROMPTS) * G):
        numbers = torch.stack(uniform)[:, b], torch.stack(order)[:, b] if is_random else None
        row = naive_row(policy, prompt_of(rollout, b), *numbers, options)
        assert rollout.responses_BT[b].tolist() == row.tokens
        assert rollout.reveal_BT[b].tolist() == row.reveal
        assert rollout.behaviour_logprobs_BT[b].tolist() == pytest.approx(row.logprobs, abs=2e-5)
        assert rollout.reveal_entropy_BT[b].tolist() == pytest.approx(row.entropies, abs=2e-5)
        if options["support"].slots is None:
            continue
        assert rollout.kept_mass_BT[b].tolist() == pytest.approx(row.masses, abs=1e-5)
        for t in range(T):
            ids = rollout.support_BTK[b, t]
            if rollout.support_mask_BTK is not None:
                ids = ids[rollout.support_mask_BTK[b, t]]
            if row.supports[t]:
                assert ids.tolist() == row.supports[t]


@each_option
def test_each_position_is_revealed_once_and_blocks_from_the_left(name):
    options = full(OPTIONS[name])
    rollout, count = reveal(POLICY, **options), options["tokens_per_step"]
    assert rollout.reveal_BT.dtype == torch.int32
    for steps in rollout.reveal_BT.tolist():
        assert sorted(steps) == [s for s in range(T // count) for _ in range(count)]
        blocks = [steps[i : i + options["block"]] for i in range(0, T, options["block"])]
        assert all(max(a) < min(b) for a, b in pairwise(blocks))


@pytest.mark.parametrize("remasking", REMASKINGS)
def test_positions_revealed_later_give_back_the_state_of_a_step(remasking):
    """The canvas that the policy saw at step s is the result with MASK from step s on."""
    seen: list[torch.Tensor] = []
    policy = MaskedTable()
    states = policy.states

    def record(ids_BL, mask_BL, *, reference=False):
        seen.append(ids_BL.clone())
        return states(ids_BL, mask_BL, reference=reference)

    policy.states = record
    rollout = reveal(policy, remasking=remasking, tokens_per_step=2)
    assert len(seen) == T // 2
    for s, ids_BL in enumerate(seen):
        hidden_BT = rollout.reveal_BT >= s
        S = rollout.prompt_length
        assert torch.equal(ids_BL[:, S:], rollout.responses_BT.masked_fill(hidden_BT, MASK))
        assert torch.equal(ids_BL[:, :S], rollout.tokens_BL[:, :S])


def test_the_most_confident_tokens_come_first_also_when_all_are_cold_and_few():
    """Confidence is of the softmax at temperature 1 over the vocabulary, not of the distribution drawn from."""
    rollout = reveal(POLICY, support=TopK(1), temperature=0.1)
    assert not rollout.behaviour_logprobs_BT.any()  # the distribution drawn from is sure of all
    for b in range(len(PROMPTS) * G):
        hidden = torch.ones(T, dtype=torch.bool)
        hidden[BLOCK:] = True
        shares = [
            float(
                state_before(POLICY, prompt_of(rollout, b), rollout.responses_BT[b], hidden, t)
                .softmax(0)
                .max()
            )
            for t in range(BLOCK)
        ]
        first = rollout.reveal_BT[b].tolist().index(0)
        assert shares[first] == max(shares)
        assert max(shares) - sorted(shares)[-2] < 1


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy"])
def test_of_equal_tokens_the_leftmost_is_revealed(remasking):
    rollout = reveal(MaskedTable(flat=True), remasking=remasking, tokens_per_step=2)
    assert rollout.reveal_BT.tolist() == [[t // 2 for t in range(T)]] * len(rollout.rows)


def test_hidden_positions_are_drawn_anew_in_each_step(monkeypatch):
    """With other numbers in the second step only, the first revealed tokens stay and later ones change."""
    plain = reveal(POLICY)
    rand, calls = torch.rand, []

    def changed(*shape, generator):
        calls.append(shape)
        numbers = rand(*shape, generator=generator)
        return 1 - numbers if len(calls) == 2 else numbers

    monkeypatch.setattr(torch, "rand", changed)
    other = reveal(POLICY)
    first = plain.reveal_BT == 0
    assert torch.equal(first, other.reveal_BT == 0)
    assert torch.equal(plain.responses_BT[first], other.responses_BT[first])
    second = other.reveal_BT == 1
    assert (plain.responses_BT[second] != other.responses_BT[second]).any()


# --- independence of rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("remasking", REMASKINGS)
@pytest.mark.parametrize("policy", [POLICY, ENDING], ids=["long", "ending"])
def test_batches_do_not_matter(policy, remasking):
    whole = reveal(policy, remasking=remasking)
    for size in (1, 2 * G, 3 * G + 1, 100):
        parts = reveal(policy, remasking=remasking, batch_size=size)
        for name in ("tokens_BL", "reveal_BT", "behaviour_logprobs_BT", "finish_B"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), (size, name)


@pytest.mark.parametrize("remasking", REMASKINGS)
def test_other_rows_and_their_ends_do_not_matter(remasking):
    """The first prompt's rows are the same beside prompts that end early and beside none."""
    first, prompts = make_prompts(PROMPTS), make_prompts(PROMPTS, seed=5)
    ids = prompts.input_ids_PS.clone()
    ids[0] = first.input_ids_PS[0]
    mixed = reveal(ENDING, remasking=remasking, prompts=type(prompts)(
        ids, prompts.attention_mask_PS, prompts.rows
    ))  # fmt: skip
    plain = reveal(ENDING, remasking=remasking)
    rows = torch.arange(G)
    one, other = take_rows(plain, rows), take_rows(mixed, rows)
    assert torch.equal(one.tokens_BL, other.tokens_BL)
    assert torch.equal(one.reveal_BT, other.reveal_BT)
    assert not torch.equal(plain.tokens_BL, mixed.tokens_BL)


def test_no_numbers_are_drawn_for_more_than_a_step(monkeypatch):
    """The memory of a rollout does not grow with its steps."""
    rand, sizes = torch.rand, []

    def measured(shape, generator):
        sizes.append(math.prod(shape))
        return rand(shape, generator=generator)

    monkeypatch.setattr(torch, "rand", measured)
    reveal(POLICY, remasking="random")
    assert sizes == [len(PROMPTS) * G * BLOCK] * 2 * T


def test_the_generator_is_all_the_randomness_there_is():
    torch.manual_seed(1)
    one = reveal(POLICY, seed=7, remasking="random")
    torch.manual_seed(2)
    again = reveal(POLICY, seed=7, remasking="random")
    assert torch.equal(again.tokens_BL, one.tokens_BL)
    assert torch.equal(again.reveal_BT, one.reveal_BT)
    other = reveal(POLICY, seed=8, remasking="random")
    assert not torch.equal(other.tokens_BL, one.tokens_BL)
    assert not torch.equal(other.reveal_BT, one.reveal_BT)


# --- draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4)], ids=["full", "top"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_have_the_shares_of_the_softmax(support, temperature, monkeypatch):
    """Over a grid of uniform numbers each id is drawn as often as its probability says, to one row."""
    rows = 1000
    grid = ((torch.arange(rows) + 0.5) / rows)[:, None]
    monkeypatch.setattr(torch, "rand", lambda shape, generator: grid.expand(shape))
    prompts = make_prompts([5])
    rollout = reveal(
        POLICY, prompts=prompts, completions=rows, max_new_tokens=1, block=1,
        support=support, temperature=temperature,
    )  # fmt: skip
    counts = torch.bincount(rollout.responses_BT[:, 0], minlength=POLICY.vocabulary)
    hidden = torch.ones(1, dtype=torch.bool)
    logits = state_before(POLICY, prompts.input_ids_PS[0], torch.tensor([END]), hidden, 0)
    logits = logits / temperature
    if support.slots is not None:
        logits[logits.argsort(descending=True)[support.slots :]] = -torch.inf
    assert (counts - rows * logits.softmax(0)).abs().max() <= 1.001
    assert int((counts > 0).sum()) > 3


@each_option
def test_mask_and_padding_are_never_drawn(name, monkeypatch):
    def edges(shape, generator):
        return torch.tensor([0.0, 1 - 2**-24]).repeat(math.prod(shape) // 2).view(shape)

    monkeypatch.setattr(torch, "rand", edges)
    rollout = reveal(POLICY, **OPTIONS[name])
    assert not torch.isin(rollout.responses_BT, torch.tensor([PAD, MASK])).any()
    assert rollout.behaviour_logprobs_BT.isfinite().all()
    if rollout.support_BTK is not None:
        kept = rollout.support_BTK
        if rollout.support_mask_BTK is not None:
            kept = kept[rollout.support_mask_BTK]
        assert not torch.isin(kept, torch.tensor([PAD, MASK])).any()


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"support": TopK(3)}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("remasking", REMASKINGS)
def test_weights_that_are_no_numbers_are_named(options, value, remasking):
    broken = MaskedTable()
    broken.place[6, 3] = broken.table[3, 4] = value
    with pytest.raises(
        UserError, match="gives no probabilities, only nan: its weights are nan or infinite"
    ):
        reveal(broken, remasking=remasking, **options)


def test_a_support_may_be_ranked_by_the_reference():
    rollout = reveal(POLICY, support=TopK(3, from_reference=True))
    plain, hidden_T = reveal(POLICY, support=TopK(3)), torch.ones(T, dtype=torch.bool)
    assert (rollout.support_BTK != plain.support_BTK).any()
    for b in range(len(rollout.rows)):
        t = rollout.reveal_BT[b].tolist().index(0)
        ids = torch.cat([prompt_of(rollout, b), torch.full((T,), MASK)])[None]
        states = POLICY.states(ids, torch.ones_like(ids, dtype=torch.bool), reference=True)
        ranks = POLICY.logits(states[:, t - T])[0]
        assert rollout.support_BTK[b, t].tolist() == ranks.topk(3).indices.tolist()
        own = state_before(POLICY, prompt_of(rollout, b), rollout.responses_BT[b], hidden_T, t)
        mass = float(own.softmax(0)[ranks.topk(3).indices].sum())
        assert float(rollout.kept_mass_BT[b, t]) == pytest.approx(mass, abs=1e-5)


class Everything(Support):
    """Keeps every id, MASK among them."""

    def select(self, logits_BV):
        ids = torch.arange(logits_BV.shape[1], dtype=torch.int32)
        return ids.expand(len(logits_BV), -1), None


def test_a_support_with_mask_in_it_does_not_draw_it():
    rollout = reveal(POLICY, support=Everything())
    assert torch.equal(rollout.tokens_BL, reveal(POLICY).tokens_BL)
