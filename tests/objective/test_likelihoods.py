"""Laws of every likelihood of masked models, and those of CoupledElbo, Elbo and Denoising alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.likelihoods import (
    CoupledElbo,
    Denoising,
    Elbo,
    Likelihood,
    behind_prompt,
)
from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from lightning_mpo.types import NEVER
from tests.support.builders import seeded, subclasses
from tests.support.masked_rollouts import ENDS, masked_rollout

LIKELIHOODS: list[Likelihood] = [
    CoupledElbo(),
    CoupledElbo(pairs=3),
    CoupledElbo(padding=False),
    Elbo(samples=1),
    Elbo(samples=4),
    Elbo(samples=3, padding=False, stratified=False),
    Denoising(steps=1),
    Denoising(steps=5),
    Denoising(steps=5, stratified=False),
    Denoising(steps=5, importance="entropy"),
    Denoising(steps=5, stratified=False, importance="entropy"),
    MeanField(),
    MeanField(prompt_share=0.0),
    CoupledTokens(),
    CoupledTokens(least=0.5, most=0.5),
]
each = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
B, T = len(ENDS), 8


def repeated(likelihood: Likelihood, values_BT: torch.Tensor) -> torch.Tensor:
    return values_BT.repeat_interleave(likelihood.repeats, 0)


def test_the_list_has_every_likelihood():
    assert subclasses(Likelihood) == {type(likelihood) for likelihood in LIKELIHOODS}


@each
def test_noise_has_a_row_for_each_repeat_of_a_response(likelihood):
    rollout = masked_rollout()
    noise = likelihood.draw(rollout, seeded(0))
    rows, C = B * likelihood.repeats, likelihood.copies
    assert noise.hidden_BCL.shape == (rows, C, rollout.tokens_BL.shape[1])
    assert noise.weights_BCT.shape == (rows, C, T)
    assert (noise.hidden_BCL.dtype, noise.weights_BCT.dtype) == (torch.bool, torch.float32)
    assert (noise.importance_B is not None) == likelihood.weighs_rows
    if noise.importance_B is not None:
        assert noise.importance_B.shape == (rows,)


@each
def test_only_hidden_tokens_of_the_canvas_are_scored(likelihood):
    rollout = masked_rollout()
    noise = likelihood.draw(rollout, seeded(1))
    S = rollout.prompt_length
    assert not ((noise.weights_BCT != 0) & ~noise.hidden_BCL[..., S:]).any()
    assert (noise.weights_BCT >= 0).all()
    scored_BT = repeated(likelihood, likelihood.scored(rollout))
    assert not ((noise.weights_BCT > 0).any(1) & ~scored_BT).any()


@each
def test_nothing_but_attended_tokens_is_hidden(likelihood):
    rollout = masked_rollout()
    noise = likelihood.draw(rollout, seeded(2))
    seen_BL = repeated(likelihood, rollout.attention_mask_BL)
    assert not (noise.hidden_BCL & ~seen_BL[:, None]).any()
    if not isinstance(likelihood, MeanField):
        assert not noise.hidden_BCL[..., : rollout.prompt_length].any()


@each
def test_the_generator_alone_determines_the_noise(likelihood):
    rollout = masked_rollout()
    first, again, other = (likelihood.draw(rollout, seeded(s)) for s in (3, 3, 4))
    for one, same in zip(first, again, strict=True):
        assert one is same or torch.equal(one, same)
    if likelihood != MeanField(prompt_share=0.0):  # it hides the canvas, and draws nothing
        assert not torch.equal(first.hidden_BCL, other.hidden_BCL)


@each
def test_a_response_that_is_an_end_token_alone_is_scored(likelihood):
    rollout = masked_rollout([0, 0])
    noise = likelihood.draw(rollout, seeded(5))
    assert (noise.weights_BCT.sum((1, 2)) > 0).all()
    assert torch.isfinite(noise.weights_BCT).all()


@pytest.mark.parametrize("likelihood", [CoupledElbo(), Elbo(samples=8)], ids=repr)
def test_padding_decides_whether_end_tokens_behind_the_first_are_part_of_the_response(likelihood):
    rollout = masked_rollout()
    for padding in (True, False):
        member = replace(likelihood, padding=padding)
        noise = member.draw(rollout, seeded(6))
        behind_BT = ~repeated(member, rollout.response_mask_BT)
        assert (noise.weights_BCT.sum(1)[behind_BT] > 0).any() == padding
        length_B = torch.full((B,), T) if padding else rollout.response_mask_BT.sum(1)
        assert torch.equal(member.scored(rollout).sum(1), length_B)


def test_a_pair_scores_each_token_once_and_pairs_differ():
    noise = CoupledElbo(pairs=3).draw(masked_rollout(), seeded(7))
    hidden_BPCT = noise.hidden_BCL[..., -T:].view(B, 3, 2, T)
    assert (hidden_BPCT.sum(2) == 1).all()
    assert not torch.equal(hidden_BPCT[:, 0], hidden_BPCT[:, 1])


def test_sizes_of_a_rollout_are_spread_over_its_rows():
    """With as many rows as sizes, each size from 0 to T comes once."""
    rollout = masked_rollout([None] * (T + 1), prompts=[2])
    hidden_BCL = CoupledElbo().draw(rollout, seeded(8)).hidden_BCL
    assert sorted(hidden_BCL[:, 0].sum(1).tolist()) == list(range(T + 1))


def test_sizes_of_a_response_are_spread_over_its_samples():
    hidden_BCL = Elbo(samples=T).draw(masked_rollout(), seeded(9)).hidden_BCL
    sizes_BN = hidden_BCL[:, 0].sum(1).view(B, T)
    assert sizes_BN.sort(1).values.tolist() == [list(range(1, T + 1))] * B


@pytest.mark.parametrize("importance", ["uniform", "entropy"])
def test_a_row_of_denoising_replays_one_step_of_its_response(importance):
    rollout, member = masked_rollout(), Denoising(steps=6, importance=importance)
    noise = member.draw(rollout, seeded(10))
    assert rollout.reveal_BT is not None
    reveal_BT = repeated(member, rollout.reveal_BT)
    last_B = rollout.reveal_BT.masked_fill(~rollout.response_mask_BT, 0).amax(1)
    last_B = repeated(member, last_B)
    for b in range(len(reveal_BT)):
        scored_T = noise.weights_BCT[b, 0] == 1
        (step,) = reveal_BT[b][scored_T].unique().tolist()
        assert 0 <= step <= last_B[b]
        assert torch.equal(scored_T, reveal_BT[b] == step)
        assert torch.equal(noise.hidden_BCL[b, 0, -T:], reveal_BT[b] >= step)
        assert noise.hidden_BCL[b, 0, -T:][reveal_BT[b] == NEVER].all()


@pytest.mark.parametrize("importance", ["uniform", "entropy"])
def test_no_step_behind_the_last_of_the_response_is_replayed(importance):
    """An end token at step 0, and tokens behind it that step 1 revealed."""
    steps_BT = torch.tensor([[0, 1, 1, 0, NEVER, NEVER, NEVER, NEVER]], dtype=torch.int32)
    rollout = replace(masked_rollout([0], prompts=[3]), reveal_BT=steps_BT)
    noise = Denoising(steps=9, importance=importance).draw(rollout, seeded(13))
    expected_BT = (steps_BT == 0).float().expand(9, -1)
    assert torch.equal(noise.weights_BCT[:, 0], expected_BT)
    if noise.importance_B is not None:
        torch.testing.assert_close(noise.importance_B, torch.ones(9))


def test_with_as_many_samples_as_steps_each_step_is_replayed_once():
    rollout = masked_rollout([None, None])
    noise = Denoising(steps=4).draw(rollout, seeded(11))
    assert rollout.reveal_BT is not None
    steps = [
        int(reveal_T[weights_CT[0] == 1][0])
        for reveal_T, weights_CT in zip(
            rollout.reveal_BT.repeat_interleave(4, 0), noise.weights_BCT, strict=True
        )
    ]
    assert [sorted(steps[:4]), sorted(steps[4:])] == [[0, 1, 2, 3]] * 2


def test_importance_undoes_the_probability_of_a_step():
    rollout, n = masked_rollout([None], prompts=[3]), 1000
    noise = Denoising(steps=n, importance="entropy").draw(rollout, seeded(12))
    assert rollout.reveal_BT is not None
    assert rollout.reveal_entropy_BT is not None
    assert noise.importance_B is not None
    entropy_S = torch.zeros(4).scatter_add(
        0, rollout.reveal_BT[0].long(), rollout.reveal_entropy_BT[0]
    )
    probability_S = entropy_S / entropy_S.sum()
    for b in range(0, n, 97):
        step = int(rollout.reveal_BT[0][noise.weights_BCT[b, 0] == 1][0])
        assert float(noise.importance_B[b]) == pytest.approx(1 / (4 * float(probability_S[step])))
    assert float(noise.importance_B.mean()) == pytest.approx(1, abs=4e-3)


def test_denoising_needs_the_steps_of_a_sampler():
    for gap in ("reveal_BT", "reveal_entropy_BT"):
        rollout = replace(masked_rollout(), **{gap: None})
        with pytest.raises(UserError, match="which this one does not record; use `rollout.sampler"):
            Denoising().draw(rollout, seeded(0))


def test_a_mask_of_other_rows_is_an_error():
    with pytest.raises(ValueError, match="as many rows as it is repeated"):
        behind_prompt(masked_rollout(), torch.zeros(B + 1, 1, T, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoupledElbo(pairs=0), "`CoupledElbo.pairs` must be at least 1, got 0"),
        (lambda: Elbo(samples=0), "`Elbo.samples` must be at least 1, got 0"),
        (lambda: Denoising(steps=0), "`Denoising.steps` must be at least 1, got 0"),
        (lambda: Elbo(samples=1001), "`Elbo.samples` must be at most 1,000, got 1001"),
        (lambda: Denoising(steps=1001), "`Denoising.steps` must be at most 1,000, got 1001"),
        (lambda: Denoising(importance="loss"), "`Denoising.importance` must be"),
        (lambda: MeanField(prompt_share=1.0), r"`MeanField.prompt_share` must be in \[0, 1\)"),
        (lambda: CoupledTokens(least=0.0), r"`CoupledTokens.least` must be in \(0, 1\)"),
        (lambda: CoupledTokens(most=1.0), r"`CoupledTokens.most` must be in \(0, 1\)"),
        (
            lambda: CoupledTokens(least=0.6, most=0.4),
            r"`CoupledTokens.least` \(0.6\) must be at most `most` \(0.4\)",
        ),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()
