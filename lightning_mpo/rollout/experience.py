"""Builds the experience of a judged rollout, once and at rollout weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token, at_tokens, moments, whiten
from lightning_mpo.functional.divergences import k3, response_k2
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Estimate, Outcome
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.ranks import Total
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Experience, Rollout


def build_experience(
    scorer: Scorer,
    objective: Objective,
    rollout: Rollout,
    scores: Scores,
    generator: torch.Generator,
    *,
    updates: int,
    reference: bool,
    total: Total = lambda values: values,
) -> Experience:
    """Compute, once and at rollout weights, all that the updates on a rollout need.

    Args:
        scorer: scores the rollout with the policy and its reference.
        objective: says what is needed.
        rollout: what was sampled.
        scores: its rewards.
        generator: of the token selection.
        updates: number of updates on this rollout. A single update computes old log-probs itself.
        reference: score with the reference as well.
        total: sums over ranks, where an advantage is whitened over all of them.
    """
    # scores of policy and reference
    device = rollout.response_mask_BT.device
    rewards_B = working_precision(scores.rewards_B, rollout.group_B.cpu()).to(device)
    valid_B = scores.valid_B.to(device)
    passes = _score(scorer, objective, rollout, updates, reference)
    old, base = passes.old, passes.reference
    # rewards -> advantages
    rewards_BT = _place(scores, rewards_B, rollout.response_mask_BT)
    rewards_BT = _less_divergence(objective, rollout, rewards_BT, passes)
    exact = scores.token_rewards_BC is not None and not objective.changes_rewards
    outcome = _outcome(rollout, rewards_BT, rewards_B if exact else None, valid_B, old)
    estimate, future_BT = _estimate(objective, _with_parts(outcome, scores, rewards_B), total)
    # tokens that carry loss
    entropy_BT = old.entropy_BT if old is not None and objective.needs_entropy else None
    weights_BT = objective.selection.choose(_kept(objective, rollout), generator, entropy_BT)
    if estimate.weights_BT is not None:
        weights_BT = weights_BT * estimate.weights_BT.float()
    # blocks, and the reference's logits for a divergence in the loss
    texts = scorer.policy.token_texts if objective.actions.needs_texts else ()
    in_loss = base is not None and not objective.changes_rewards
    return Experience(
        rollout=rollout,
        rewards_B=(rewards_BT.sum(1) if objective.changes_rewards else rewards_B).float(),
        valid_B=valid_B,
        advantages_BT=estimate.advantages_BT.float(),
        future_advantages_BT=None if future_BT is None else future_BT.float(),
        token_weights_BT=weights_BT,
        segments_BT=objective.actions.segment(rollout, entropy_BT, texts),
        old_logprobs_BT=_anchor(objective, rollout, old, updates),
        old_future_BTM=old.future_BTM if old is not None and updates > 1 else None,
        reference_logprobs_BT=None if base is None else base.logprobs_BT,
        reference_logits_BTK=base.support_logits_BTK if base is not None and in_loss else None,
        values_BT=None if old is None else old.values_BT,
        returns_BT=None if estimate.returns_BT is None else estimate.returns_BT.float(),
        old_entropy_BT=entropy_BT if objective.surrogate.needs_entropy else None,
        correction_BT=_correction(objective, rollout, old),
    )


def working_precision(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """Return rewards as float32, or as float64 if rounding would hide differences within a group.

    Rewards such as -1e9 and -1e9 + 1 are equal in float32. The mean of their group is then
    subtracted in float64.

    Args:
        rewards_B: float64.
        group_B: rows of one prompt share a number.
    """
    groups, index_B = group_B.unique(return_inverse=True)

    def over_groups(values_B: Tensor, how: str) -> Tensor:
        return torch.zeros(len(groups), dtype=torch.float64).scatter_reduce(
            0, index_B, values_B.double(), how, include_self=False
        )

    spread_P = over_groups(rewards_B, "amax") - over_groups(rewards_B, "amin")
    error_P = over_groups((rewards_B - rewards_B.float().double()).abs(), "amax")
    rounding_P = 1e-12 * over_groups(
        rewards_B.abs(), "amax"
    )  # rounding of float64 sums of equal terms
    blurred = (spread_P > rounding_P) & (error_P > 1e-3 * spread_P)
    return rewards_B if blurred.any() else rewards_B.float()


def divergence_from_reference(
    experience: Experience, likelihood: Likelihood | None = None
) -> Tensor | None:
    """Return k3 of each response token at rollout weights, nats, one-dimensional.

    With a likelihood of whole responses it is k2 of each response, per token. None: there are no
    reference log-probs.

    Args:
        experience: a rollout, with the noise of a masked policy.
        likelihood: of the objective.
    """
    reference_BT, rollout = experience.reference_logprobs_BT, experience.rollout
    if reference_BT is None:
        return None
    old_BT = experience.old_logprobs_BT
    if likelihood is not None and old_BT is not None:
        mask_BT = experience.token_weights_BT > 0
        if likelihood.token_level:
            return k3(old_BT, reference_BT)[mask_BT]
        return response_k2(old_BT, reference_BT, mask_BT).amax(1)
    divergence_BT = k3(rollout.behaviour_logprobs_BT if old_BT is None else old_BT, reference_BT)
    return divergence_BT[rollout.response_mask_BT]


def mean_over_ranks(total: Total, values: Tensor) -> float:
    """Return the mean over all ranks' values; ranks may have different numbers of them."""
    sums, count = total(
        torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])
    )
    return (sums / count.clamp(min=1)).item()


@dataclass(frozen=True)
class _Passes:
    """Scores of the policy and of its reference; None: not needed."""

    old: TokenScores | None
    reference: TokenScores | None


def _score(
    scorer: Scorer, objective: Objective, rollout: Rollout, updates: int, with_reference: bool
) -> _Passes:
    if objective.likelihood is not None:  # rows are scored after they got their noise
        return _Passes(None, None)
    recompute = updates > 1 and not objective.surrogate.at_behaviour
    others = (
        objective.changes_rewards,
        objective.needs_entropy,
        objective.request.values,
        objective.correction,
    )
    old = reference = None
    if recompute or any(others):
        old = scorer.score(
            rollout,
            request=replace(
                objective.request, future=objective.actions.future, upkeep=False, candidates=False
            ),
        )
    if with_reference:
        exact = ScoreRequest(support_logits=objective.request.support_logits)
        reference = scorer.score(rollout, request=exact, reference=True)
    _check_distribution(rollout, old, reference)
    return _Passes(old, reference)


def _check_distribution(
    rollout: Rollout, old: TokenScores | None, reference: TokenScores | None
) -> None:
    """Refuse to mix log-probs over the whole vocabulary with log-probs over a support.

    They differ by the mass of the support.
    """
    for name, scores in (("policy", old), ("reference", reference)):
        if scores is not None and scores.on_support != (rollout.support_BTK is not None):
            raise UserError(
                f"the log-probs of the {name} are over "
                f"{'the stored support' if scores.on_support else 'the whole vocabulary'}, those "
                "of the rollout are not: `score` of the policy class must use "
                "`rollout.support_BTK` for policy and reference alike, and set "
                "`TokenScores.on_support`"
            )


def _place(scores: Scores, rewards_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Place rewards of tokens at their tokens, and rewards of responses at the last token."""
    if scores.token_rewards_BC is None:
        return at_last_token(rewards_B, mask_BT)
    mask, device = mask_BT.cpu(), mask_BT.device
    return at_tokens(scores.token_rewards_BC, scores.rewards_B, mask).to(device, rewards_B.dtype)


def _less_divergence(
    objective: Objective, rollout: Rollout, rewards_BT: Tensor, passes: _Passes
) -> Tensor:
    """Subtract the divergence from the rewards of tokens, if it is part of the reward."""
    mask_BT, kl = rollout.response_mask_BT, objective.term(KLPenalty)
    old, reference = passes.old, passes.reference
    if kl is None or not kl.in_reward or old is None or reference is None:
        return rewards_BT
    divergence_BT = kl.divergence(
        old.logprobs_BT,
        reference.logprobs_BT,
        old.support_logits_BTK,
        reference.support_logits_BTK,
        rollout.support_mask_BTK,
    )
    return rewards_BT - kl.controller.coefficient * (divergence_BT * mask_BT)


def _outcome(
    rollout: Rollout,
    rewards_BT: Tensor,
    sums_B: Tensor | None,
    valid_B: Tensor,
    old: TokenScores | None,
) -> Outcome:
    """Return the input of advantages; an empty response has the reward 0."""
    mask_BT, tokens_BT = rollout.response_mask_BT, rollout.responses_BT
    group_size = int((rollout.group_B == rollout.group_B[0]).sum())
    values_BT = None if old is None else old.values_BT
    if sums_B is not None:
        sums_B = torch.where(mask_BT.any(1), sums_B, 0)
    return Outcome(rewards_BT, mask_BT, group_size, valid_B, values_BT, tokens_BT, sums_B)


def _with_parts(outcome: Outcome, scores: Scores, rewards_B: Tensor) -> Outcome:
    """Add each reward by itself, in the precision of their sum."""
    if not scores.by_reward:
        return outcome
    parts_BR = torch.stack(list(scores.by_reward.values()), 1).to(rewards_B)
    weights_R = [scores.weights.get(name, 1.0) for name in scores.by_reward]
    return replace(outcome, parts_BR=parts_BR, weights_R=parts_BR.new_tensor(weights_R))


def _estimate(
    objective: Objective, outcome: Outcome, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Estimate, Tensor | None]:
    """Return the advantages, and those of the later tokens of a block if they have their own."""
    estimate = objective.advantage.estimate(outcome)
    if objective.advantage.whiten:
        sums = over_ranks(moments(estimate.advantages_BT, outcome.valid_BT))
        white_BT = whiten(estimate.advantages_BT, outcome.valid_BT, sums)
        estimate = estimate._replace(advantages_BT=white_BT)
    return estimate, objective.actions.future_advantages(outcome, estimate.advantages_BT)


def _anchor(
    objective: Objective, rollout: Rollout, old: TokenScores | None, updates: int
) -> Tensor | None:
    """Return the denominators of ratios; None: the update's own log-probs without gradient."""
    if objective.surrogate.at_behaviour:
        return rollout.behaviour_logprobs_BT
    return old.logprobs_BT if old is not None and updates > 1 else None


def _correction(objective: Objective, rollout: Rollout, old: TokenScores | None) -> Tensor | None:
    if objective.correction is None or old is None:
        return None
    return objective.correction.weights(
        old.logprobs_BT, rollout.behaviour_logprobs_BT, rollout.response_mask_BT
    )


def _kept(objective: Objective, rollout: Rollout) -> Tensor:
    """Return the mask of tokens that may carry loss: all, or all inside their support."""
    mask_BT, outside_BT = rollout.response_mask_BT, rollout.outside_BT
    if outside_BT is None or objective.support.outside != "drop":
        return mask_BT
    return mask_BT & ~outside_BT
