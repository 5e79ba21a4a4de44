"""Rows with noise: their order, what counts in them, their old log-probs, and their way into a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.one_pass import MeanField
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.rollout.noised import noise_metrics, replay_steps, score_noised, with_noise
from lightning_mpo.scores import TokenScores
from lightning_mpo.types import NEVER, Rollout
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


@dataclass
class Scorer:
    """Scores a token by what its copies hide; the reference sees each score doubled."""

    calls: list[bool] = field(default_factory=list)

    def score(self, rollout: Rollout, *, reference: bool = False) -> TokenScores:
        self.calls.append(reference)
        assert rollout.hidden_BCL is not None
        assert rollout.copy_weights_BCT is not None
        base_BC = -rollout.hidden_BCL.sum(2) / 10 * (1 + reference)
        logprobs_BT = (rollout.copy_weights_BCT * base_BC[..., None]).sum(1)
        return TokenScores(logprobs_BT, torch.zeros_like(logprobs_BT))


@each
def test_samples_of_a_response_stand_together_and_passes_follow_each_other(likelihood):
    made, source = noised(likelihood, passes=PASSES), judged(masked_rollout())
    row_B = torch.arange(B).repeat_interleave(likelihood.repeats).repeat(PASSES)
    assert len(made.rewards_B) == PASSES * B * likelihood.repeats
    assert torch.equal(made.rewards_B, source.rewards_B[row_B])
    assert torch.equal(made.rollout.group_B, source.rollout.group_B[row_B])
    assert torch.equal(made.rollout.tokens_BL, source.rollout.tokens_BL[row_B])
    assert made.rollout.hidden_BCL is not None
    if likelihood != MeanField(prompt_share=0.0):
        passes = made.rollout.hidden_BCL.chunk(PASSES)
        assert not torch.equal(*passes), "each pass has noise of its own"


@each
def test_a_response_has_one_advantage_also_behind_its_end(likelihood):
    advantages_B = torch.arange(1.0, B + 1)
    source = judged(masked_rollout(), advantages_B)
    made = with_noise(source, likelihood, seeded(0), passes=1)
    row_B = torch.arange(B).repeat_interleave(likelihood.repeats)
    counted_BT = made.token_weights_BT > 0
    expected_BT = torch.where(counted_BT, advantages_B[row_B][:, None], 0.0)
    assert torch.equal(made.advantages_BT, expected_BT)
    assert torch.equal(made.mask_BT, counted_BT)
    if getattr(likelihood, "padding", False):
        behind_BT = ~source.rollout.response_mask_BT[row_B]
        assert (made.advantages_BT[behind_BT] > 0).all()


@each
def test_all_of_a_response_counts_or_the_scored_tokens_alone(likelihood):
    made = noised(likelihood, passes=PASSES)
    assert made.rollout.copy_weights_BCT is not None
    scored_BT = (made.rollout.copy_weights_BCT > 0).any(1)
    row_B = torch.arange(B).repeat_interleave(likelihood.repeats).repeat(PASSES)
    whole_BT = likelihood.scored(masked_rollout())[row_B]
    assert torch.equal(made.mask_BT, scored_BT if likelihood.token_level else whole_BT)
    if isinstance(likelihood, Elbo):
        assert not torch.equal(scored_BT, whole_BT), "a mask hides a part"


@each
@pytest.mark.parametrize("reduction", [SequenceMean(), ConstantLength(1)], ids=repr)
def test_every_row_counts_once_in_the_denominator(likelihood, reduction):
    if likelihood.weighs_rows and isinstance(reduction, SequenceMean):
        pytest.skip("refused")
    made = noised(likelihood, passes=1)
    parts = masked_objective(likelihood, reduction=reduction).denominators(made)
    assert float(parts.actions) == B * likelihood.repeats


@each
def test_rows_without_a_valid_reward_count_nowhere(likelihood):
    valid_B = torch.ones(B, dtype=torch.bool)
    valid_B[[0, 4]] = False
    made = noised(likelihood, passes=1, valid_B=valid_B)
    assert not made.mask_BT[~made.valid_B].any()
    parts = masked_objective(likelihood).denominators(made)
    assert float(parts.actions) == (B - 2) * likelihood.repeats


@each
def test_tokens_outside_their_support_stay_without_loss(likelihood):
    """Tokens behind an end are on the canvas as well, and dropped like those of the response."""
    outside_BT = torch.zeros(B, T, dtype=torch.bool)
    outside_BT[[0, 2, 3], [0, 5, 7]] = True
    outside_BT[4, 3] = True  # behind the end
    source = judged(replace(masked_rollout(), outside_BT=outside_BT))
    kept, dropped = (
        with_noise(source, likelihood, seeded(0), passes=PASSES, drop_outside=drop)
        for drop in (False, True)
    )
    row_B = torch.arange(B).repeat_interleave(likelihood.repeats).repeat(PASSES)
    assert (kept.token_weights_BT * outside_BT[row_B]).any()
    expected_BT = kept.token_weights_BT * ~outside_BT[row_B]
    assert torch.equal(dropped.token_weights_BT, expected_BT)
    assert not dropped.mask_BT[outside_BT[row_B]].any()
    assert not dropped.advantages_BT[outside_BT[row_B]].any()


def test_another_number_of_copies_than_a_likelihood_names_is_an_error():
    class Wrong(CoupledElbo):
        copies = 3

    with pytest.raises(UserError, match=r"`Wrong.copies` is 3, and `draw` returns 2"):
        with_noise(judged(masked_rollout()), Wrong(), seeded(0), passes=1)


def test_lengths_of_an_elbo_are_those_of_responses_and_not_of_masks():
    """The mean log-ratio and k2 divide by L; a row scores only the hidden tokens."""
    made = noised(Elbo(samples=3), passes=1)
    assert made.rollout.copy_weights_BCT is not None
    scored_BT = (made.rollout.copy_weights_BCT > 0).any(1)
    now_BT = (0.1 * scored_BT).requires_grad_()
    made = replace(made, old_logprobs_BT=torch.zeros_like(now_BT))
    kl = KLPenalty(ConstantCoefficient(1.0), "k2", level="sequence")
    subject = masked_objective(
        Elbo(samples=3), actions=SequenceActions(), reduction=SequenceMean(), terms=[kl]
    )
    made = replace(made, reference_logprobs_BT=torch.zeros_like(now_BT))
    scores = TokenScores(now_BT, torch.zeros_like(now_BT))
    _, metrics = subject.loss(made, scores, subject.denominators(made))
    count_B = scored_BT.sum(1)
    total, weight = metrics["kl/reference"]
    expected_B = (0.1 * count_B) ** 2 / (2 * T)
    assert float(total / weight) == pytest.approx(float(expected_B.mean()), rel=1e-5)
    actions = subject.actions.actions(now_BT, made.advantages_BT, made.mask_BT)
    ratios = actions.log_ratios_BU[actions.mask_BU]
    assert ratios.tolist() == pytest.approx((0.1 * count_B / T).tolist(), rel=1e-5)


@each
def test_the_mean_entropy_is_that_of_scored_tokens(likelihood):
    made = noised(likelihood, passes=1)
    assert made.rollout.copy_weights_BCT is not None
    scored_BT = (made.rollout.copy_weights_BCT > 0).any(1).float()
    subject = masked_objective(likelihood)
    scores = TokenScores(torch.zeros_like(scored_BT), 1.5 * scored_BT)
    _, metrics = subject.loss(made, scores, subject.denominators(made))
    total, count = metrics["policy/entropy"]
    assert float(total / count) == pytest.approx(1.5)


def test_old_logprobs_of_denoising_are_the_samplers():
    scorer = Scorer()
    subject, made = masked_objective(Denoising(steps=3)), noised(Denoising(steps=3), passes=PASSES)
    done = score_noised(scorer, subject, made, updates=4, reference=False)
    assert scorer.calls == [], "no pass is needed"
    row_B = torch.arange(B).repeat_interleave(3).repeat(PASSES)
    behaviour_BT = masked_rollout().behaviour_logprobs_BT[row_B]
    assert done.old_logprobs_BT is not None
    assert torch.equal(done.old_logprobs_BT[made.mask_BT], behaviour_BT[made.mask_BT])
    assert (done.old_logprobs_BT[~made.mask_BT] == 0).all()
    assert (done.old_logprobs_BT[made.mask_BT] < 0).any()


@pytest.mark.parametrize("likelihood", [CoupledElbo(), Elbo(samples=2), MeanField()], ids=repr)
def test_old_and_reference_see_the_noise_of_the_row(likelihood):
    subject, made = masked_objective(likelihood), noised(likelihood, passes=PASSES)
    cases = [
        (1, False, []),
        (4, False, [False]),
        (1, True, [False, True]),
        (4, True, [False, True]),
    ]
    for updates, reference, calls in cases:
        scorer = Scorer()
        done = score_noised(scorer, subject, made, updates=updates, reference=reference)
        assert scorer.calls == calls
        assert (done.old_logprobs_BT is not None) == (False in calls)
        assert (done.reference_logprobs_BT is not None) == reference
        if reference:
            torch.testing.assert_close(done.reference_logprobs_BT, 2 * done.old_logprobs_BT)


def test_the_effective_share_of_equal_weights_is_one():
    def total(sums: Tensor) -> Tensor:
        return sums

    weighted = Denoising(steps=3, importance="entropy")
    made = noised(weighted, passes=PASSES)
    share = noise_metrics(masked_objective(weighted), made, total)["likelihood/effective_share"]
    weights_B = made.token_weights_BT.amax(1).double()
    assert share == pytest.approx(float(weights_B.mean() ** 2 / weights_B.square().mean()))
    assert share < 1
    flat = replace(made, token_weights_BT=made.mask_BT.float())
    assert noise_metrics(masked_objective(weighted), flat, total) == {
        "likelihood/effective_share": 1.0
    }
    assert noise_metrics(masked_objective(Denoising()), made, total) == {}
    assert noise_metrics(Objective(), made, total) == {}


def test_replayed_steps_score_each_drawn_token_once():
    rollout = replay_steps(masked_rollout())
    assert rollout.reveal_BT is not None
    assert rollout.copy_weights_BCT is not None
    drawn_BT = rollout.reveal_BT != NEVER
    assert torch.equal(rollout.copy_weights_BCT.sum(1), drawn_BT.float())
    assert torch.equal(rollout.response_mask_BT, drawn_BT)
    some = replay_steps(masked_rollout(), most=2)
    assert some.copy_weights_BCT is not None
    assert some.copy_weights_BCT.shape[1] == 2
    assert some.reveal_BT is not None
    assert some.reveal_BT[some.response_mask_BT].unique().tolist() == [0, 3]


def test_a_sampler_without_steps_cannot_be_replayed():
    with pytest.raises(UserError, match="use `rollout.sampler: DiffusionSampler`"):
        replay_steps(replace(masked_rollout(), reveal_BT=None))


@each
def test_a_response_that_is_an_end_token_alone_trains(likelihood):
    made = with_noise(judged(masked_rollout([0, 0])), likelihood, seeded(0), passes=1)
    assert made.mask_BT.any(1).all()
    assert made.advantages_BT[made.mask_BT].ne(0).all()


def test_a_token_mean_over_masks_weighs_all_samples_of_a_response_alike():
    subject = masked_objective(Elbo(samples=4), reduction=TokenMean())
    made = noised(Elbo(samples=4), passes=1)
    weights_BU = subject.actions.token_counts(made.mask_BT)
    assert weights_BU.sum(1).unique().tolist() == [T]
