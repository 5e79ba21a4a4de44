"""A loss term: the policy loss of multi-token heads (docs/algorithms.md 11.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, positive, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.functional.head_coefficients import calibrated_coefficients
from lightning_mpo.functional.surrogates import clipped_ratio
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.terms import LossBatch, LossTerm
from lightning_mpo.scores import Metrics, ScoreRequest


@dataclass(frozen=True)
class HeadPolicyLoss(LossTerm):
    """Trains multi-token heads, and the trunk through them, by the clipped policy loss (RL-MTP).

        coef · (1/M) · Σ_n mean_t clipped(q_n(o_{t+n} | h_t) / π_old(o_{t+n}), λ_{b,n} · A_{t+n})
        λ_{b,n} = Σ_t δ_{t+n} δ^n_t / (Σ_t (δ^n_t)² + 1e-8)              by response b
        δ_t = log π(o_t) - log π_old(o_t),   δ^n_t = log q_n(o_{t+n} | h_t) - log π_old(o_{t+n})

    λ is the paper's optimal coefficient calibration (OCC): it follows the correlation of heads and
    policy. arXiv:2605.28184 [P, abstract; S, the formula; C, the authors' code]; docs/algorithms.md
    11.3. In the first update on a rollout λ is 0, so use several updates per rollout. This term
    replaces `HeadUpkeep`. With `policy.mtp.detach_trunk: false` its gradient also trains the trunk,
    which is the aim of the paper.

    Args:
        offsets: M, number of heads that are trained.
        coef: scale of λ, positive; 1 [S], 0.1 in the authors' script [C].
        low: lower clip distance of the heads' ratios, in (0, 1); 0.2 [C].
        high: upper clip distance of the heads' ratios, positive; 0.28 [C].

    Raises:
        UserError: an option is out of range.
    """

    offsets: int = 2
    coef: float = 1.0
    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        at_least("HeadPolicyLoss", 1, offsets=self.offsets)
        positive("HeadPolicyLoss", coef=self.coef, note="; leave it out of `terms` instead")
        within("HeadPolicyLoss", "(0, 1)", low=self.low)
        positive("HeadPolicyLoss", high=self.high)

    @property
    def request(self) -> ScoreRequest:
        return ScoreRequest(future=self.offsets)

    @property
    def learns_alone(self) -> bool:
        return False

    def check_with(self, axes: Axes) -> None:
        if axes[ActionSpace].future:
            raise UserError(
                "`HeadPolicyLoss` gives multi-token heads a loss of their own, and "
                f"`{type(axes[ActionSpace]).__name__}` has them in its ratios already; use "
                "`source: backbone`, or take `HeadPolicyLoss` out of `objective.terms`"
            )

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics] | None:
        heads_BTM, experience = batch.scores.future_BTM, batch.experience
        if heads_BTM is None:
            return None
        heads_BTM = heads_BTM[..., : self.offsets]
        # log-probs of policy and old policy at t + n; in a single update both are the same
        now_BT = batch.scores.logprobs_BT.detach()
        old_BT = now_BT if experience.old_logprobs_BT is None else experience.old_logprobs_BT
        mask_BTM = self._shifted(experience.mask_BT, windows=True)
        old_BTM = self._shifted(old_BT)
        head_BTM = torch.where(mask_BTM, heads_BTM - old_BTM, 0.0)
        # coefficients by response -> losses of heads -> their mean
        coefficients_BM = calibrated_coefficients(
            head_BTM, self._shifted(now_BT) - old_BTM, mask_BTM
        )
        advantages_BTM = coefficients_BM[:, None] * self._shifted(experience.advantages_BT)
        losses_BTM = clipped_ratio(
            head_BTM.flatten(1),
            advantages_BTM.to(head_BTM).flatten(1),
            low=self.low,
            high=self.high,
        ).view_as(head_BTM)
        losses_BT = torch.where(mask_BTM, losses_BTM, 0.0).mean(-1)
        metrics = self._measure(coefficients_BM, mask_BTM)
        return self.coef * batch.mean(losses_BT), metrics

    def _shifted(self, values_BT: Tensor, *, windows: bool = False) -> Tensor:
        """Return the values at t + n, `[B, T, M]`; of a mask, whether t … t + n are all in it."""
        move = window if windows else shift_left
        return torch.stack([move(values_BT, n) for n in range(1, self.offsets + 1)], -1)

    def _measure(self, coefficients_BM: Tensor, mask_BTM: Tensor) -> Metrics:
        counted_BM = mask_BTM.any(1).float()
        return {
            f"heads/coefficient_{n + 1}": (
                (coefficients_BM[:, n] * counted_BM[:, n]).sum(),
                counted_BM[:, n].sum(),
            )
            for n in range(self.offsets)
        }
