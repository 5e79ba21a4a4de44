"""Norms and clipping of gradients, apart for policy, heads and critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.functional.sharded_rows import full_weight

Parts = Mapping[str, Sequence[nn.Parameter]]
"""Trained weights by part: `policy`, `mtp`, `critic`."""


def gradient_norms(parts: Parts, update: int) -> dict[str, Tensor]:
    """Return the gradient norm of each part, over all shards.

    Args:
        parts: trained weights by part.
        update: number of the update, for the message.

    Raises:
        UserError: a norm is infinite or not a number.
    """
    norms = {}
    for part, weights in parts.items():
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norms[part] = full_weight(nn.utils.get_total_norm(gradients))
        if not torch.isfinite(norms[part]):
            raise UserError(
                f"the gradient norm of the {part} is {norms[part].item()} at update {update}: "
                "lower the learning rate, or set `trainer.gradient_clip_val`; the last "
                "checkpoint is from before this update"
            )
    return norms


def clip_gradients(parts: Parts, bound: float | None, algorithm: str | None) -> None:
    """Clip each part apart, in place: a large gradient of one must not shrink another's step.

    Args:
        parts: trained weights by part.
        bound: largest norm or value; None or 0: nothing is clipped.
        algorithm: "value" clips values, all else the norm.
    """
    if bound is None or not bound > 0:
        return
    for weights in parts.values():
        if algorithm == "value":
            nn.utils.clip_grad_value_(weights, bound)
        else:
            nn.utils.clip_grad_norm_(weights, bound)
