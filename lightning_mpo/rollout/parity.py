"""The parity gate: sampler and trainer must agree on log-probs before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy
from lightning_mpo.rollout.noised import replay_steps
from lightning_mpo.types import Rollout, take_rows, trim_rollout


class ParityError(UserError):
    """Sampler and trainer disagree about the log-probs of the same tokens."""


@dataclass(frozen=True)
class Parity:
    """Differences of log-probs over response tokens, in nats."""

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, difference: Tensor) -> Parity:
        """Summarise absolute differences."""
        size = difference.abs().double()
        return cls(size.mean().item(), size.quantile(0.99).item(), size.max().item())

    def describe(self) -> str:
        """Return the differences in words."""
        return f"mean {self.mean:.2g}, max {self.max:.2g} nats"

    def passes(self, exact: bool) -> bool:
        """Apply the bounds: fp32 max 1e-3; else mean 0.06 and 99th percentile 0.3."""
        return self.max <= 1e-3 if exact else self.mean <= 0.06 and self.p99 <= 0.3


def check_parity(
    policy: Policy, rollout: Rollout, *, temperature: float, exact: bool, rows: int = 32
) -> Parity:
    """Compare the sampler's log-probs with the trainer's, padded and unpadded.

    A masked policy scores the steps of its sampler, each from the row that the sampler saw.

    Args:
        policy: at the weights that sampled.
        rollout: with its recorded log-probs.
        temperature: of the trainer.
        exact: float32 throughout.
        rows: how many rows to compare.

    Raises:
        ParityError: beyond the bounds; names the cause where it can be told.
    """
    part = take_rows(
        rollout, torch.arange(min(rows, len(rollout.group_B)), device=rollout.group_B.device)
    )
    part = replay_steps(part) if policy.masked else part
    mask_BT = _compared(part)
    recorded = part.behaviour_logprobs_BT[mask_BT]

    def score(batch: Rollout, at: float) -> Tensor:
        with torch.no_grad():
            return policy.score(batch, _compared(batch), temperature=at).logprobs_BT

    trainer = score(part, temperature)[mask_BT]
    alone = torch.cat(
        [
            score(row, temperature)[_compared(row)]
            for row in (
                trim_rollout(take_rows(part, torch.tensor([b])))
                for b in range(min(len(mask_BT), 8))
            )
        ]
    )
    padding = Parity.of(trainer[: len(alone)] - alone)
    if not padding.passes(exact):
        raise ParityError(
            f"the trainer scores padded and unpadded rows differently ({padding.mean:.3g} nats in "
            f"the mean, {padding.max:.3g} at most): "
            f"{_why_padding_counts(policy, score(part, temperature)[mask_BT] - trainer)}"
        )
    parity = Parity.of(trainer - recorded)
    if parity.passes(exact):
        return parity
    cause = _cause(part, recorded, score, temperature, exact)
    raise ParityError(
        f"sampler and trainer disagree by {parity.mean:.3g} nats in the mean and {parity.max:.3g} "
        f"at most over {len(recorded)} tokens, so that every ratio would be wrong: {cause}"
    )


def _why_padding_counts(policy: Policy, repeated: Tensor) -> str:
    """Return the cause, as far as scoring the same rows a second time tells."""
    if Parity.of(repeated).max > 0:
        return (
            f"scoring the same rows twice differs too ({Parity.of(repeated).max:.3g} nats), so "
            "that something in the model is random; set its dropouts to 0 (`lora.dropout` among "
            "them)"
        )
    cause = "positions or attention of this model depend on padding"
    return cause + (
        "; try `policy.share_prompts: false`" if getattr(policy, "share_prompts", False) else ""
    )


def _compared(rollout: Rollout) -> Tensor:
    """Return the mask of compared tokens, without those that were added to their support."""
    mask_BT, outside_BT = rollout.response_mask_BT, rollout.outside_BT
    return mask_BT if outside_BT is None else mask_BT & ~outside_BT


def _cause(
    rollout: Rollout,
    recorded: Tensor,
    score: Callable[[Rollout, float], Tensor],
    temperature: float,
    exact: bool,
) -> str:
    mask_BT = _compared(rollout)

    def agrees(batch: Rollout, at: float) -> bool:
        return Parity.of(score(batch, at)[mask_BT] - recorded).passes(exact)

    # the support, applied on one side only
    if rollout.support_BTK is not None and agrees(
        replace(rollout, support_BTK=None, support_mask_BTK=None), temperature
    ):
        return (
            "the sampler recorded full-vocabulary log-probs while the trainer takes them on the "
            "support"
        )
    if rollout.support_BTK is None and rollout.kept_mass_BT is not None:
        full = score(rollout, temperature) - rollout.kept_mass_BT.clamp(min=1e-30).log()
        if Parity.of(full[mask_BT] - recorded).passes(exact):
            return (
                "the sampler drew from a truncated support that the trainer does not apply "
                "(ratio = kept mass)"
            )
    # another temperature
    for other in (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 2.0):
        if other != temperature and agrees(rollout, other):
            return f"the sampler used temperature {other}, the trainer {temperature}"
    return (
        "neither temperature nor support explains it; compare position ids, attention "
        "implementation, dropout and precision of the two"
    )
