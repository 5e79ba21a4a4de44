"""What a loss says about its actions, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.functional.actions import window
from lightning_mpo.functional.divergences import k3, response_k2
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.functional.surrogates import safe_ratio
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.scores import Metrics, TokenScores
from lightning_mpo.types import Experience


def diagnose(actions: Actions) -> Metrics:
    """Return metrics of actions: mean ratio, mean absolute log-ratio, tokens per action, mean factor."""
    log_ratios_BU, mask_BU = actions.log_ratios_BU.detach(), actions.mask_BU
    ratio_BU = safe_ratio(log_ratios_BU)
    starts = mask_BU.sum().float()
    metrics = {
        "ratio/mean": ((ratio_BU * mask_BU).sum(), starts),
        "ratio/abs_log": ((log_ratios_BU.abs() * mask_BU).sum(), starts),
        "ratio/tokens_per_action": ((actions.weights_BU * mask_BU).sum(), starts),
    }
    if actions.factors_BU is not None:
        metrics["ratio/trace"] = ((actions.factors_BU * mask_BU).sum(), starts)
    return metrics


def diagnose_heads(log_ratios_BTN: Tensor, future_BTM: Tensor, mask_BT: Tensor) -> Metrics:
    """Describe, by offset n, the heads' cross-entropy in nats and the size of their log-ratio."""
    metrics: Metrics = {}
    for n in range(1, log_ratios_BTN.shape[-1]):
        alive_BT = window(mask_BT, n)
        count = alive_BT.sum().float()
        metrics[f"heads/cross_entropy_{n}"] = (-(future_BTM[..., n - 1] * alive_BT).sum(), count)
        metrics[f"heads/abs_log_ratio_{n}"] = (
            (log_ratios_BTN[..., n].abs() * alive_BT).sum(),
            count,
        )
    return metrics


def diagnose_correction(correction_BT: Tensor, mask_BT: Tensor) -> Metrics:
    """Describe the weights between sampler and trainer: their mean, and the share of tokens that
    they leave out.
    """
    count = mask_BT.sum().float()
    return {
        "correction/weight": ((correction_BT * mask_BT).sum(), count),
        "correction/masked": (((correction_BT == 0) & mask_BT).sum().float(), count),
    }


def measure_trust(
    actions: Actions, stopped_BT: Tensor, distance_BT: Tensor, cap: float | None
) -> Metrics:
    """Describe a trust region over tokens: the share of good and of bad ones that it stops, and how
    far they moved.

    Args:
        actions: single tokens.
        stopped_BT: which of them are beyond the trust region.
        distance_BT: their divergences from the policy that sampled.
        cap: largest weight; None: none.
    """
    mask_BT = actions.mask_BU
    count = mask_BT.sum().float()
    metrics = {"trust/divergence": (torch.where(mask_BT, distance_BT, 0.0).sum(), count)}
    for name, side_BT in (("good", actions.advantages_BU > 0), ("bad", actions.advantages_BU < 0)):
        tokens_BT = side_BT & mask_BT
        metrics[f"trust/masked_{name}"] = (
            (stopped_BT & tokens_BT).sum().float(),
            tokens_BT.sum().float(),
        )
    if cap is not None:
        capped_BT = safe_ratio(actions.log_ratios_BU.detach()) > cap
        metrics["trust/capped"] = ((capped_BT & mask_BT).sum().float(), count)
    return metrics


def diagnose_policy(
    experience: Experience, scores: TokenScores, tokens_BT: Tensor, likelihood: Likelihood | None
) -> Metrics:
    """Return the entropy, and the divergence from the reference if it was scored, nats per token.

    The divergence is k3. With a likelihood of whole responses it is k2 of these, per token.

    Args:
        experience: a micro-batch.
        scores: of the current policy.
        tokens_BT: weights of tokens.
        likelihood: of the objective; None: of a causal policy.
    """
    # only tokens that a copy scores have an entropy
    count, seen_BT, weights_BCT = tokens_BT.sum(), tokens_BT, experience.rollout.copy_weights_BCT
    if weights_BCT is not None:
        seen_BT = tokens_BT * (weights_BCT > 0).any(1)
    entropy = (scores.entropy_BT.detach() * seen_BT).sum()
    metrics: Metrics = {"policy/entropy": (entropy, seen_BT.sum())}
    logprobs_BT, reference_BT = scores.logprobs_BT.detach(), experience.reference_logprobs_BT
    if reference_BT is None:
        return metrics
    if likelihood is None or likelihood.token_level:
        divergence_BT = k3(logprobs_BT, reference_BT)
    else:
        divergence_BT = response_k2(logprobs_BT, reference_BT, experience.mask_BT)
    return metrics | {"kl/reference": (weighted_sum(divergence_BT, tokens_BT, 1.0), count)}
