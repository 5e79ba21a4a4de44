"""Completions that restart inside others: what is copied, what is sampled, and what training makes of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.advantages import GroupRelative, PrefixTree
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.objective.surrogates import PolicyGradient
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.sampling import LocalSampler, PrefixReplay, SamplingRequest
from lightning_mpo.sampling.replay import prompts_up_to, restart_positions
from lightning_mpo.types import Finish, take_rows
from tests.support.builders import END, PAD, make_prompts, make_rollout, seeded
from tests.support.runs import fit, make_objective, same

P, G, LIMIT = 5, 6, 10
SUPPORTS = {"full": FullVocabulary(), "top": TopK(4), "nucleus": Nucleus(0.9, max_k=8)}
each_support = pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)


class Watched(LocalSampler):
    """Keeps what it was asked for and what it drew."""

    def __init__(self):
        super().__init__()
        self.asked, self.drawn = [], []

    def sample(self, policy, prompts, completions, request, **options):
        self.asked.append((prompts, completions, request.max_new_tokens))
        self.drawn.append(super().sample(policy, prompts, completions, request, **options))
        return self.drawn[-1]


def draw(policy, support, share=0.5, seed=0, limit=LIMIT, completions=G):
    sampler = Watched()
    rollout = PrefixReplay(share).sample(
        sampler,
        policy,
        make_prompts([6, 3, 5, 2, 4]),
        completions,
        SamplingRequest(support, 0.8, limit),
        generator=seeded(seed),
    )
    return rollout, sampler


def response(rollout, row):
    return rollout.responses_BT[row][rollout.response_mask_BT[row]].tolist()


def whole(rollout, row):
    return rollout.tokens_BL[row][rollout.attention_mask_BL[row]].tolist()


@each_support
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_from_the_prompt_and_copies_with_what_was_sampled_behind_them(
    tiny_policy, support, seed
):
    """Row by row from the two calls of the sampler: tokens, log-probs, supports, kept mass, ends, texts."""
    policy = tiny_policy(sharp=4.0)
    rollout, sampler = draw(policy, support, seed=seed)
    (_, F, limit), (_, one, rest) = sampler.asked
    first, again = sampler.drawn
    assert (F, limit, one) == (3, LIMIT, 1)
    assert torch.equal(rollout.group_B, torch.arange(P).repeat_interleave(G))
    copies = []
    for p in range(P):
        for g in range(G):
            row = p * G + g
            prompt = whole(first, p * F)[: -len(response(first, p * F))]
            assert whole(rollout, row) == prompt + response(rollout, row)
            assert rollout.rows[row] == make_prompts([6, 3, 5, 2, 4]).rows[p]
            if g < F:
                parts, finish = [(first, p * F + g, 0, LIMIT)], first.finish_B[p * F + g]
            else:
                tail = p * (G - F) + g - F
                copied = whole(again, tail)[: -len(response(again, tail))][len(prompt) :]
                sources = [
                    p * F + f
                    for f in range(F)
                    if response(first, p * F + f)[: len(copied)] == copied
                ]
                sources = [
                    s
                    for s in sources
                    if len(response(first, s)) > max(len(copied), 1) or not copied
                ]
                assert sources, (
                    "the prefix is that of no completion of the same prompt, or all of one"
                )
                copies.append(len(copied))
                room = LIMIT - len(copied)
                parts = [(first, sources[0], 0, len(copied)), (again, tail, 0, room)]
                over = len(response(again, tail)) > room
                finish = Finish.LENGTH if over else again.finish_B[tail]
            assert rollout.finish_B[row] == finish
            expected = sum((response(batch, b)[start:stop] for batch, b, start, stop in parts), [])
            assert response(rollout, row) == expected
            for name in (
                "behaviour_logprobs_BT",
                "kept_mass_BT",
                "support_BTK",
                "support_mask_BTK",
            ):
                recorded = getattr(rollout, name)
                assert (recorded is None) == (getattr(first, name) is None)
                if recorded is not None:
                    pieces = [
                        getattr(batch, name)[b, start:stop] for batch, b, start, stop in parts
                    ]
                    torch.testing.assert_close(
                        recorded[row][: len(expected)], torch.cat(pieces)[: len(expected)]
                    )
            text = policy.tokenizer.decode(expected, skip_special_tokens=True)
            assert rollout.texts[row] == text
    assert rest == LIMIT - min(copies)
    assert max(copies) > 1
    assert rollout.response_mask_BT.shape[1] <= LIMIT
    assert not rollout.behaviour_logprobs_BT[~rollout.response_mask_BT].any()


@each_support
def test_what_was_copied_and_sampled_is_scored_as_recorded(tiny_policy, support):
    policy = tiny_policy(sharp=8.0)
    rollout, _ = draw(policy, support)
    assert check_parity(policy, rollout, temperature=0.8, exact=True).max < 1e-4


def test_it_is_a_function_of_the_generator(tiny_policy):
    policy = tiny_policy(sharp=4.0)
    (one, _), (two, _), (other, _) = (draw(policy, TopK(4), seed=seed) for seed in (3, 3, 4))
    for item in fields(one):
        values = [getattr(rollout, item.name) for rollout in (one, two)]
        equal = (
            torch.equal(*values) if isinstance(values[0], torch.Tensor) else values[0] == values[1]
        )
        assert equal, item.name
    assert one.texts != other.texts


def test_a_longer_response_than_the_limit_is_cut_and_says_so(tiny_policy):
    """Rows restart at different places and are sampled together, so that some get more tokens than they may keep."""
    cut = 0
    for seed in range(4):
        rollout, sampler = draw(tiny_policy(sharp=1.0), FullVocabulary(), seed=seed, limit=6)
        lengths = rollout.response_mask_BT.sum(1)
        assert lengths.max() <= 6
        ended = torch.tensor([response(rollout, b)[-1] == END for b in range(P * G)])
        assert torch.equal(rollout.finish_B == Finish.STOP, ended)
        assert (lengths[~ended] == 6).all()
        cut += int(sampler.drawn[1].response_mask_BT.shape[1] > 6 - 2)
    assert cut


def test_positions_are_uniform_within_a_response():
    lengths = torch.tensor([1, 2, 5]).repeat(20_000)
    positions = restart_positions(lengths, torch.rand(len(lengths), generator=seeded(0))).view(
        -1, 3
    )
    assert not positions[:, 0].any()
    assert (positions[:, 1] == 1).all()
    counts = torch.bincount(positions[:, 2], minlength=6)
    assert counts[0] == counts[5] == 0
    assert ((counts[1:5] - 5000.0) ** 2 / 5000).sum() < 31.8  # chi-square, 3 degrees: 6e-7
    assert restart_positions(torch.tensor([7]), torch.tensor([1.0 - 2**-24])).item() == 6


def test_prompts_are_padded_on_the_left():
    rollout = make_rollout([3, 2], [4, 2, 5, 3])
    batch = prompts_up_to(rollout, torch.tensor([3, 0, 1, 2]), ())
    for b, position in enumerate([3, 0, 1, 2]):
        mask = batch.attention_mask_PS[b]
        start = take_rows(rollout, torch.tensor([b]))
        expected = start.tokens_BL[0][: 3 + position][start.attention_mask_BL[0][: 3 + position]]
        assert torch.equal(batch.input_ids_PS[b][mask], expected)
        assert mask.int().diff().min() >= 0
        assert (batch.input_ids_PS[b][~mask] == PAD).all()


@pytest.mark.parametrize(("share", "fresh"), [(0.5, 3), (0.4, 4), (0.1, 6), (0.9, 1), (2 / 3, 2)])
def test_the_share_is_of_the_completions(share, fresh):
    assert PrefixReplay(share).fresh(6) == fresh


# --- training -------------------------------------------------------------------------------------------------------


def t_spmo(**axes):
    return make_objective(**{"surrogate": PolicyGradient(), "advantage": PrefixTree()} | axes)


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(5)], ids=["full", "top"])
def test_a_run_passes_the_parity_gate_and_gives_late_tokens_credit(tmp_path, support):
    depth = {}
    for name, replay in (("replay", PrefixReplay(0.5)), ("plain", None)):
        run = fit(
            tmp_path / name,
            objective=t_spmo(support=support),
            rollout={"replay": replay, "max_new_tokens": 12},
        )
        assert run.rollout._gate_passed
        weights = run.rollout.experience.token_weights_BT
        places = torch.arange(weights.shape[1]).expand_as(weights)
        depth[name] = places[weights > 0].double().mean().item()
        assert all(torch.isfinite(weight).all() for weight in run.weights.values())
    assert depth["replay"] > depth["plain"] + 0.5


def test_two_equal_runs_are_equal(tmp_path):
    runs = [
        fit(tmp_path / str(i), objective=t_spmo(), rollout={"replay": PrefixReplay()})
        for i in range(2)
    ]
    assert same(runs[0].weights, runs[1].weights)
    assert runs[0].record.without_clocks() == runs[1].record.without_clocks()


def test_others_are_refused_by_name(tmp_path):
    with pytest.raises(
        UserError, match="which `GroupRelative` would count again; use `advantage: PrefixTree`"
    ):
        fit(
            tmp_path,
            objective=make_objective(advantage=GroupRelative()),
            rollout={"replay": PrefixReplay()},
        )
    with pytest.raises(UserError, match="which `PrefixTree.count: true` would count again"):
        PrefixReplay().check(4, PrefixTree(count=True))
    with pytest.raises(
        UserError, match=r"`PrefixReplay.share` \(0.1\) restarts none of 4 completions"
    ):
        PrefixReplay(0.1).check(4, PrefixTree())
    for share in (0.0, 1.0):
        with pytest.raises(
            UserError, match=rf"`PrefixReplay.share` must be in \(0, 1\), got {share}"
        ):
            PrefixReplay(share)
    PrefixReplay(0.5).check(4, PrefixTree())
