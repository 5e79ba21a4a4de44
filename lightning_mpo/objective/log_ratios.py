"""From log-probs of tokens to their log-ratios against the old policy (docs/algorithms.md 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import ActionSpace, GroupTerms, TokenTerms
from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Experience


def token_log_ratios(experience: Experience, scores: TokenScores) -> tuple[Tensor, Tensor]:
    """Return the log-ratios of tokens and the log-probs that they are against, in nats.

    Args:
        experience: a micro-batch; without old log-probs, ratios are against the policy itself.
        scores: of the current policy.

    Returns:
        Log-ratios, `[B, T]`, or `[B, T, 1 + M]` with multi-token heads, 0 where masked; and
        log-probs of the tokens alone, `[B, T]`.
    """
    mask_BT = experience.mask_BT
    now = _with_heads(scores.logprobs_BT, scores.future_BTM)
    if experience.old_logprobs_BT is None:
        old = now.detach()
    else:
        old_future_BTM = None if now.ndim == 2 else experience.old_future_BTM
        old = _with_heads(experience.old_logprobs_BT, old_future_BTM)
    log_ratios = torch.where(mask_BT if now.ndim == 2 else mask_BT[..., None], now - old, 0.0)
    return log_ratios, old if old.ndim == 2 else old[..., 0]


def token_terms(experience: Experience, scores: TokenScores, old_BT: Tensor) -> TokenTerms:
    """Return the quantities of single tokens, for actions of one token."""
    return TokenTerms(
        scores.logprobs_BT,
        old_BT,
        experience.old_entropy_BT,
        scores.candidate_logprobs_BTK,
        experience.rollout.candidate_logprobs_BTK,
    )


def group_terms(space: ActionSpace, experience: Experience, scores: TokenScores) -> GroupTerms:
    """Return the log-ratios of actions against the reference, and the prompt of each row.

    Args:
        space: groups tokens into actions.
        experience: a micro-batch of whole groups, scored by the reference.
        scores: of the current policy.
    """
    reference_BT, mask_BT = experience.reference_logprobs_BT, experience.mask_BT
    if reference_BT is None:
        raise RuntimeError("the surrogate needs a rollout that the reference has scored")
    log_ratios_BT = torch.where(mask_BT, scores.logprobs_BT - reference_BT, 0.0)
    log_ratios_BU = space.action_log_ratios(log_ratios_BT, mask_BT, experience.segments_BT)[0]
    return GroupTerms(log_ratios_BU, experience.rollout.group_B)


def _with_heads(logprobs_BT: Tensor, future_BTM: Tensor | None) -> Tensor:
    """Put the offsets of heads behind the token itself: `[B, T, 1 + M]`, or `[B, T]` without."""
    if future_BTM is None:
        return logprobs_BT
    return torch.cat([logprobs_BT[..., None], future_BTM], -1)
