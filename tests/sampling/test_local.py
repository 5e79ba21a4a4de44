"""The sampler on the KV cache: what it records, what it draws, and that its shortcuts change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, Support, TopK
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import Finish, PromptBatch, Rollout
from tests.support.builders import END, VOCABULARY, make_prompts, seeded

PROMPTS, G, T = [4, 7, 1, 5], 6, 12
SUPPORTS = [FullVocabulary(), TopK(5), TopK(1), TopK(VOCABULARY)]
each_support = pytest.mark.parametrize("support", SUPPORTS, ids=["full", "top5", "top1", "topV"])


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy()


def sample(policy, prompts: PromptBatch | None = None, completions: int = G, **options) -> Rollout:
    batch_size = options.pop("batch_size", None)
    generator, progress = options.pop("generator", seeded(0)), options.pop("progress", None)
    request = SamplingRequest(
        **{"support": FullVocabulary(), "temperature": 1.0, "max_new_tokens": T} | options
    )
    prompts = make_prompts(PROMPTS) if prompts is None else prompts
    return LocalSampler(batch_size).sample(
        policy, prompts, completions, request, generator=generator, progress=progress
    )


def lora_policy(folder: str) -> CausalPolicy:
    policy = CausalPolicy(folder, lora=Lora(rank=4))
    policy.build(device=torch.device("cpu"), reference=True)
    return policy


def next_logits(policy, tokens: list[int]) -> Tensor:
    """Return the logits behind a text, from a plain forward pass without cache or padding."""
    with torch.no_grad():
        return policy.network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def first_token_probabilities(policy, prompts: PromptBatch, temperature: float = 1.0) -> Tensor:
    ids = prompts.input_ids_PS[0][prompts.attention_mask_PS[0]].tolist()
    return (next_logits(policy, ids) / temperature).double().softmax(0)


def naive_sample(
    policy, prompts: PromptBatch, uniform: Tensor, support: Support, temperature: float
) -> list[list[int]]:
    """Draw one row at a time by inverse transform: the first token whose cumulative probability exceeds a uniform."""
    rows = []
    for b in range(len(uniform)):
        p = b // G
        prompt = prompts.input_ids_PS[p][prompts.attention_mask_PS[p]].tolist()
        response: list[int] = []
        while len(response) < uniform.shape[1] and (not response or response[-1] != END):
            logits = next_logits(policy, prompt + response) / temperature
            ids = list(range(VOCABULARY))
            if isinstance(support, TopK):
                ids = sorted(ids, key=lambda v, logits=logits: -logits[v].item())[: support.k]
            probabilities = logits[ids].double().softmax(0).tolist()
            u, total, chosen = uniform[b, len(response)].item(), 0.0, ids[-1]
            for token, probability in zip(ids, probabilities, strict=True):
                total += probability
                if total > u:
                    chosen = token
                    break
            response.append(chosen)
        rows.append(response)
    return rows


def responses(rollout: Rollout) -> list[list[int]]:
    return [
        row[mask].tolist()
        for row, mask in zip(rollout.responses_BT, rollout.response_mask_BT, strict=True)
    ]


# --- what is drawn --------------------------------------------------------------------------------------------------


@each_support
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_those_of_a_loop_without_cache_padding_or_sharing(policy, support, temperature):
    rollout = sample(policy, support=support, temperature=temperature)
    uniform = torch.rand(len(PROMPTS) * G, T, generator=seeded(0))
    assert responses(rollout) == naive_sample(
        policy, make_prompts(PROMPTS), uniform, support, temperature
    )
    if support.__class__ is FullVocabulary:
        assert (
            len({len(row) for row in responses(rollout)}) > 3
        )  # rows did leave the batch at different times


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("k", [None, 4])
def test_first_tokens_have_the_frequencies_of_the_softmax(policy, k, temperature):
    """Pearson's chi-square stays within 5 standard deviations of its expectation, and nothing leaves the support."""
    prompts, n = make_prompts([5]), 6000
    support = FullVocabulary() if k is None else TopK(k)
    rollout = sample(policy, prompts, n, support=support, temperature=temperature, max_new_tokens=1)
    expected = first_token_probabilities(policy, prompts, temperature)
    if k is not None:
        outside = expected.argsort(descending=True)[k:]
        expected[outside] = 0
        expected = expected / expected.sum()
    counts = torch.bincount(rollout.responses_BT[:, 0], minlength=VOCABULARY).double()
    assert not counts[expected == 0].any()
    likely = expected * n >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    predicted = torch.cat([expected[likely], expected[~likely].sum()[None]]) * n
    keep = predicted > 0
    chi_square = ((observed - predicted)[keep].square() / predicted[keep]).sum().item()
    freedom = int(keep.sum()) - 1
    assert freedom >= 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_token_of_probability_zero_is_never_drawn(policy, monkeypatch):
    """Also not by a uniform number of exactly 0 or of almost 1, with impossible tokens at both ends."""

    def edges(*shape, generator):
        return torch.tensor([0.0, 1 - 2**-24]).expand(*shape[:-1], shape[-1] // 2, 2).reshape(shape)

    logits = torch.zeros(VOCABULARY)
    logits[[0, 1, 2, -1]] = -torch.inf
    monkeypatch.setattr(torch, "rand", edges)
    monkeypatch.setattr(
        policy, "logits", lambda hidden, reference: logits.expand(len(hidden), -1).clone()
    )
    rollout = sample(policy)
    assert responses(rollout) == [[3, VOCABULARY - 2] * (T // 2)] * (len(PROMPTS) * G)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"support": TopK(3)}])
def test_weights_that_are_no_numbers_are_named(tiny_policy, value, options):
    broken = tiny_policy()
    with torch.no_grad():
        broken.network.model.layers[0].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(
        UserError, match="gives no probabilities, only nan: its weights are nan or infinite"
    ):
        sample(broken, **options)


def test_greedy_takes_what_generate_takes(policy):
    prompts = make_prompts(PROMPTS)
    rollout = sample(policy, prompts, 1, greedy=True, temperature=0.7)
    policy.eval()
    expected = policy.network.generate(
        input_ids=prompts.input_ids_PS,
        attention_mask=prompts.attention_mask_PS.long(),
        do_sample=False,
        max_new_tokens=T,
        pad_token_id=0,
        eos_token_id=END,
    )
    policy.train()
    width = rollout.tokens_BL.shape[1]
    assert torch.equal(rollout.tokens_BL, expected[:, :width])
    assert not (expected[:, width:] != 0).any()


def test_greedy_inside_a_support_is_plain_greedy(policy):
    one, other = (
        sample(policy, greedy=True, support=support) for support in (FullVocabulary(), TopK(3))
    )
    assert torch.equal(one.tokens_BL, other.tokens_BL)


def test_the_generator_is_all_the_randomness_there_is(policy):
    torch.manual_seed(1)
    one = sample(policy, generator=seeded(7))
    torch.manual_seed(2)
    assert torch.equal(sample(policy, generator=seeded(7)).tokens_BL, one.tokens_BL)
    assert responses(sample(policy, generator=seeded(8))) != responses(one)


# --- what is recorded -----------------------------------------------------------------------------------------------


@each_support
@pytest.mark.parametrize(
    ("temperature", "greedy"), [(1.0, False), (0.6, False), (1.5, False), (0.8, True)]
)
def test_recorded_logprobs_are_those_of_the_trainer(policy, support, temperature, greedy):
    rollout = sample(policy, support=support, temperature=temperature, greedy=greedy)
    mask = rollout.response_mask_BT
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=temperature).logprobs_BT
    assert rollout.behaviour_logprobs_BT.dtype == torch.float32
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)
    assert not rollout.behaviour_logprobs_BT[~mask].any()


def test_the_support_of_every_step_is_recorded_with_its_mass(policy):
    rollout = sample(policy, support=TopK(5), temperature=0.7)
    prompts = make_prompts(PROMPTS)
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t, token in enumerate(response):
            probabilities = (next_logits(policy, prompt + response[:t]) / 0.7).softmax(0)
            best = probabilities.topk(5)
            assert rollout.support_BTK[b, t].tolist() == best.indices.tolist()
            assert token in best.indices
            assert rollout.kept_mass_BT[b, t].item() == pytest.approx(
                best.values.sum().item(), abs=1e-5
            )
    assert rollout.support_BTK.dtype == torch.int32
    full = sample(policy)
    assert full.support_BTK is None
    assert full.support_mask_BTK is None
    assert full.kept_mass_BT is None


@pytest.fixture(params=["copy", "adapters"])
def drifted(request, tiny_policy, tiny_folder):
    """A policy that has left its reference, which is a copy or the base with adapters off."""
    policy = tiny_policy(reference=True) if request.param == "copy" else lora_policy(tiny_folder)
    moved = policy.network.parameters() if request.param == "copy" else policy.parts()["policy"]
    with torch.no_grad():
        for weight in moved:
            weight.add_(0.3 * torch.randn(weight.shape, generator=seeded(1)))
    return policy


@pytest.mark.parametrize(
    "support", [TopK(5, from_reference=True), Nucleus(0.9, 6, from_reference=True)]
)
def test_a_support_of_the_reference_holds_its_most_probable_tokens(drifted, support):
    rollout = sample(drifted, support=support, temperature=0.7)
    prompts, elsewhere = make_prompts(PROMPTS), 0
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t in range(len(response)):
            with drifted.as_reference():
                network = drifted.reference_network or drifted.network
                ranks = (
                    network(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1:].detach()
                    / 0.7
                )
            support_BK, slots_BK = support.select(ranks)
            assert rollout.support_BTK[b, t].tolist() == support_BK[0].tolist()
            if slots_BK is not None:
                assert rollout.support_mask_BTK[b, t].tolist() == slots_BK[0].tolist()
            own = (next_logits(drifted, prompt + response[:t]) / 0.7).softmax(0)
            inside = support_BK[0] if slots_BK is None else support_BK[0][slots_BK[0]]
            assert rollout.kept_mass_BT[b, t].item() == pytest.approx(
                own[inside.long()].sum().item(), abs=1e-5
            )
            elsewhere += set(own.topk(len(inside)).indices.tolist()) != set(inside.tolist())
    assert elsewhere > 10  # the policy itself would have chosen other sets
    with torch.no_grad():
        scored = drifted.score(rollout, rollout.response_mask_BT, temperature=0.7).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)


class Ragged(Support):
    """Keeps two to four of the five best tokens: a support with slots that hold nothing."""

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        best = logits_BV.topk(5)
        size = 2 + (best.indices[:, :1] % 3)
        return best.indices.int(), torch.arange(5) < size


def test_supports_with_empty_slots_are_never_left_and_replayed(policy):
    rollout = sample(policy, support=Ragged())
    mask = rollout.response_mask_BT
    assert rollout.support_mask_BTK.shape == rollout.support_BTK.shape
    hits = (rollout.support_BTK == rollout.responses_BT[..., None]) & rollout.support_mask_BTK
    assert torch.equal(hits.any(-1), mask)
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=1.0).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)


def test_rows_stop_at_the_end_token_and_say_so(policy):
    rollout = sample(policy)
    finishes = set()
    for row, mask, response, finish in zip(
        rollout.responses_BT,
        rollout.response_mask_BT,
        responses(rollout),
        rollout.finish_B.tolist(),
        strict=True,
    ):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # no gap
        assert not row[~mask].any()
        assert END not in response[:-1]
        assert finish == (Finish.STOP if response[-1] == END else Finish.LENGTH)
        if finish == Finish.LENGTH:
            assert len(response) == T
        finishes.add(finish)
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_groups_are_neighbours_and_texts_are_the_tokens_without_the_end(policy):
    prompts = make_prompts(PROMPTS)
    rollout = sample(policy, prompts)
    S = prompts.input_ids_PS.shape[1]
    assert rollout.prompt_length == S
    assert rollout.group_B.tolist() == [p for p in range(len(PROMPTS)) for _ in range(G)]
    assert torch.equal(rollout.tokens_BL[:, :S], prompts.input_ids_PS.repeat_interleave(G, 0))
    expected_mask = torch.cat(
        [prompts.attention_mask_PS.repeat_interleave(G, 0), rollout.response_mask_BT], 1
    )
    assert torch.equal(rollout.attention_mask_BL, expected_mask)
    assert [row.prompt for row in rollout.rows] == [
        str(p) for p in range(len(PROMPTS)) for _ in range(G)
    ]
    alphabet = policy.characters
    for text, response in zip(rollout.texts, responses(rollout), strict=True):
        assert text == "".join(alphabet[token - 2] for token in response if token >= 2)
    assert len(set(rollout.texts)) > 1


# --- shortcuts ------------------------------------------------------------------------------------------------------


def assert_same(one: Rollout, other: Rollout) -> None:
    assert responses(one) == responses(other)
    assert one.finish_B.tolist() == other.finish_B.tolist()
    assert one.texts == other.texts
    assert torch.equal(one.group_B, other.group_B)
    for name in ("behaviour_logprobs_BT", "kept_mass_BT"):
        a, b = getattr(one, name), getattr(other, name)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    if one.support_BTK is not None:
        assert torch.equal(one.support_BTK, other.support_BTK)


@pytest.mark.parametrize("batch_size", [1, G, 2 * G, 3 * G + 1])
@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_decoding_in_batches_changes_nothing(policy, support, batch_size):
    assert_same(
        sample(policy, support=support, batch_size=batch_size), sample(policy, support=support)
    )


def test_finished_rows_leave_the_batch(policy):
    widths = []
    handle = policy.decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rollout = sample(policy)
    handle.remove()
    S = rollout.prompt_length
    assert widths[0] == (len(PROMPTS), S)  # a prompt is read once for its group
    assert all(width == 1 for _, width in widths[1:])
    batches = [rows for rows, _ in widths[1:]]
    lengths = rollout.response_mask_BT.sum(1)
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] < len(PROMPTS) * G
    for t, rows in enumerate(batches, start=1):
        running = int((lengths > t).sum())
        assert running <= rows <= running + max(1, rows // 8)


def test_more_padding_on_the_left_changes_nothing(policy):
    wide = sample(policy, make_prompts(PROMPTS, extra=5))
    prompts = make_prompts(PROMPTS, extra=5)
    narrow = PromptBatch(
        prompts.input_ids_PS[:, 5:], prompts.attention_mask_PS[:, 5:], prompts.rows
    )
    assert_same(wide, sample(policy, narrow))


def test_a_prompt_is_answered_alike_alone_and_in_company(policy):
    prompts = make_prompts(PROMPTS)
    alone = PromptBatch(prompts.input_ids_PS[:1], prompts.attention_mask_PS[:1], prompts.rows[:1])
    assert (
        responses(sample(policy, alone)) == responses(sample(policy, prompts))[:G]
    )  # the same uniform numbers


# --- ends -----------------------------------------------------------------------------------------------------------


def test_sampling_stops_when_every_row_has(policy, monkeypatch):
    """With the end token certain after the second one, no third step is taken."""
    logits, steps = policy.logits, []

    def ending(hidden, reference):
        steps.append(len(hidden))
        values = logits(hidden)
        values[:, END] = 100.0 if len(steps) == 2 else -100.0
        return values

    monkeypatch.setattr(policy, "logits", ending)
    rollout = sample(policy, max_new_tokens=50)
    assert len(steps) == 2
    assert rollout.response_mask_BT.shape == (len(PROMPTS) * G, 2)
    assert rollout.response_mask_BT.all()
    assert (rollout.responses_BT[:, 1] == END).all()
    assert (rollout.finish_B == Finish.STOP).all()


def test_one_token_is_one_forward_pass(policy):
    calls = []
    handle = policy.decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = sample(policy, max_new_tokens=1)
    handle.remove()
    assert len(calls) == 1
    assert rollout.response_mask_BT.tolist() == [[True]] * (len(PROMPTS) * G)
    ends = rollout.responses_BT[:, 0] == END
    assert torch.equal(rollout.finish_B == Finish.STOP, ends)


def test_progress_adds_up_to_the_tokens_drawn(policy):
    seen: list[tuple[int, int]] = []
    rollout = sample(policy, progress=lambda tokens, running: seen.append((tokens, running)))
    assert sum(tokens for tokens, _ in seen) == int(rollout.response_mask_BT.sum())
    lengths = rollout.response_mask_BT.sum(1)
    stopped = rollout.finish_B == Finish.STOP
    assert [running for _, running in seen] == [
        int(((lengths > t + 1) | ((lengths == t + 1) & ~stopped)).sum()) for t in range(len(seen))
    ]


def test_a_single_completion_needs_no_copy_of_the_cache(policy):
    rollout = sample(policy, completions=1)
    assert len(responses(rollout)) == len(PROMPTS)
    mask = rollout.response_mask_BT
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=1.0).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)


# --- candidates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_candidates_are_the_most_probable_ids_of_what_was_sampled_from(policy, support, k):
    rollout = sample(policy, support=support, temperature=0.7, candidates=k)
    plain = sample(policy, support=support, temperature=0.7)
    assert torch.equal(rollout.tokens_BL, plain.tokens_BL)  # recording changes no draw
    assert plain.candidates_BTK is None
    assert plain.candidate_logprobs_BTK is None
    assert rollout.candidates_BTK.shape[-1] == k + 1
    assert rollout.candidate_logprobs_BTK.dtype == torch.float32
    prompts, others = make_prompts(PROMPTS), 0
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t, token in enumerate(response):
            logits = next_logits(policy, prompt + response[:t]) / 0.7
            ids, slots = support.select(logits[None])
            inside = list(range(VOCABULARY)) if ids is None else ids[0].tolist()
            inside = (
                inside
                if slots is None
                else [i for i, slot in zip(inside, slots[0].tolist(), strict=True) if slot]
            )
            logprobs = dict(zip(inside, logits[inside].log_softmax(0).tolist(), strict=True))
            best = sorted(logprobs, key=lambda v, logprobs=logprobs: -logprobs[v])[:k]
            found = rollout.candidate_logprobs_BTK[b, t].tolist()
            held = {
                i: x
                for i, x in zip(rollout.candidates_BTK[b, t].tolist(), found, strict=True)
                if x > -math.inf
            }
            assert list(held)[: len(best)] == best
            assert set(held) == {*best, token}
            assert held == pytest.approx({v: logprobs[v] for v in held}, abs=1e-5)
            assert found[len(best) : k] == [-math.inf] * (k - len(best))
            assert held[token] == rollout.behaviour_logprobs_BT[b, t].item()
            others += token not in best
    assert others > 0 or k == 7
    assert (rollout.candidate_logprobs_BTK[~rollout.response_mask_BT] == -torch.inf).all()


def test_of_equal_candidates_the_lowest_ids_come_first(policy, monkeypatch):
    """Also where the reference ranked the support, so that its slots are in another order."""
    flat = lambda hidden, reference=False: torch.zeros(len(hidden), VOCABULARY)  # noqa: E731
    monkeypatch.setattr(policy, "logits", flat)

    class Backwards(Support):
        def select(self, logits_BV):
            return torch.tensor([9, 4, 7, 2], dtype=torch.int32).expand(len(logits_BV), -1), None

    for support, best in ((FullVocabulary(), [0, 1, 2]), (Backwards(), [2, 4, 7])):
        rollout = sample(policy, support=support, candidates=3)
        ids = rollout.candidates_BTK[rollout.response_mask_BT]
        assert (ids[:, :3] == torch.tensor(best)).all()


@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_the_trainer_scores_candidates_as_the_sampler_recorded_them(policy, support):
    whole = sample(policy, support=support, temperature=0.7, candidates=3)
    parts = sample(policy, support=support, temperature=0.7, candidates=3, batch_size=2 * G)
    assert torch.equal(whole.candidates_BTK, parts.candidates_BTK)
    torch.testing.assert_close(
        whole.candidate_logprobs_BTK, parts.candidate_logprobs_BTK, rtol=0, atol=1e-5
    )
    request = ScoreRequest(candidates=True)
    scored = policy.score(
        whole, whole.response_mask_BT, temperature=0.7, request=request
    ).candidate_logprobs_BTK
    assert not scored.requires_grad
    torch.testing.assert_close(scored, whole.candidate_logprobs_BTK, rtol=0, atol=1e-5)
