"""Metrics of the trust region, for every surrogate and action space."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.functional.divergences import k3
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.surrogates import Surrogate
from lightning_mpo.scores import Metrics
from lightning_mpo.types import Experience


def diagnose_trust(
    surrogate: Surrogate,
    token_level: bool,
    actions: Actions,
    log_ratios: Tensor,
    bounded: Tensor,
    experience: Experience,
) -> Metrics:
    """Return the shares that the trust region stops, and the divergence from the old policy.

    Args:
        surrogate: of the objective.
        token_level: every action is one token.
        actions: of the micro-batch.
        log_ratios: of tokens, `[B, T]`, or `[B, T, 1 + M]` with heads, nats.
        bounded: the same after `Surrogate.bound`.
        experience: the rows.
    """
    metrics = surrogate.measure(actions)
    mask_BT, count = experience.mask_BT, experience.mask_BT.sum().float()
    token_BT = log_ratios.detach() if log_ratios.ndim == 2 else log_ratios[..., 0].detach()
    # actions that the trust region stops, and tokens that it would stop one by one
    clipped_BU = surrogate.clipped(actions)
    if clipped_BU is not None:
        metrics["ratio/clip_fraction"] = (clipped_BU.sum().float(), actions.mask_BU.sum().float())
    if clipped_BU is not None and not token_level:
        tokens = Actions(token_BT, experience.advantages_BT, mask_BT, mask_BT.float())
        clipped_BT = surrogate.clipped(tokens)
        if clipped_BT is not None:
            metrics["ratio/token_clip_fraction"] = (clipped_BT.sum().float(), count)
    # tokens whose log-ratios are bounded before they are grouped
    if bounded is not log_ratios:
        changed = bounded != log_ratios
        changed_BT = changed if changed.ndim == 2 else changed[..., 0]
        metrics["ratio/token_clip_fraction"] = ((changed_BT & mask_BT).sum().float(), count)
    # divergence from the policy of the rollout
    metrics["kl/old"] = ((k3(token_BT, torch.zeros_like(token_BT)) * mask_BT).sum(), count)
    return metrics
