"""Scoring of whole rollouts without gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.scores import ScoreRequest, TokenScores, join_scores
from lightning_mpo.types import Rollout, take_rows


@dataclass(frozen=True)
class Scorer:
    """Scores rollouts with a policy or its reference, in passes of bounded size.

    Args:
        policy: a built one.
        temperature: logits are divided by it, as in the rollout.
        tokens: tokens (padding included) of one pass.
        precision: entered around every pass, such as autocast; None: the weights' own precision.
    """

    policy: Policy
    temperature: float = 1.0
    tokens: int = 16_384
    precision: Callable[[], AbstractContextManager[object]] | None = None

    @property
    def exact(self) -> bool:
        """Whether everything is computed in float32, so that equal log-probs agree closely."""
        return self.precision is None and all(
            p.dtype == torch.float32 for p in self.policy.parameters()
        )

    def context(self) -> AbstractContextManager[object]:
        """Return the context of a pass."""
        return nullcontext() if self.precision is None else self.precision()

    def score(
        self, rollout: Rollout, *, request: ScoreRequest | None = None, reference: bool = False
    ) -> TokenScores:
        """Return the scores of all response tokens of a rollout.

        Args:
            rollout: what was sampled.
            request: what is needed besides log-probs and entropy.
            reference: ask the reference instead of the policy.
        """
        rows_B = torch.arange(len(rollout.group_B), device=rollout.group_B.device)
        size = max(1, self.tokens // rollout.tokens_BL.shape[1])
        parts: list[TokenScores] = []
        with rollout_mode(self.policy), self.context():
            for rows in rows_B.split(size):
                part = take_rows(rollout, rows)
                parts.append(
                    self.policy.score(
                        part,
                        part.response_mask_BT,
                        temperature=self.temperature,
                        request=request or ScoreRequest(),
                        reference=reference,
                    )
                )
        return join_scores(parts)
