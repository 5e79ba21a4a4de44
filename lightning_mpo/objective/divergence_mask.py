"""The surrogate whose trust region is a divergence of distributions (docs/algorithms.md 5.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_mpo.checks import at_least, not_below, one_of, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional import surrogates as F
from lightning_mpo.functional.trust_regions import outside_trust_region, trust_divergence
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.loss_metrics import measure_trust
from lightning_mpo.objective.surrogates import Surrogate
from lightning_mpo.scores import Metrics


@dataclass(frozen=True)
class DivergenceMask(Surrogate):
    """`-sg(M·min(r, cap))·A·log π`: a token stops learning once its distribution has moved too far
    (DPPO).

    The trust region is a divergence from the policy that sampled, and not a ratio, so that unlikely
    tokens may grow by large factors and likely ones may not lose much. arXiv:2602.04879 Eq. 12-16
    [P, C]; docs/algorithms.md 5.6. Ratios are against the sampler's own log-probs: recomputed ones
    collapse [P], and nothing has to be recomputed.

    Args:
        delta: bound for tokens whose probability falls, and also for those that rise unless
            `delta_up` is given; positive. 0.15 in probability for "tv" [P, C]; take 0.05 nats for
            "kl" [P].
        delta_up: bound for tokens whose probability rises; None: `delta`.
        divergence: "tv" total variation, "kl" from the sampler's policy to the current one.
        cap: largest weight, at least 1; 5 in the paper's scaling runs [P], 20 in verl and TRL [C];
            None: none.
        top_k: ids whose probabilities are compared besides the sampled token, which the sampler
            must record; None: the binary divergence. 20 in the paper, without a clear gain [P].
    """

    needs_token_actions = True
    at_behaviour = True

    delta: float = 0.15
    delta_up: float | None = None
    divergence: Literal["tv", "kl"] = "tv"
    cap: float | None = 5.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        positive("DivergenceMask", delta=self.delta, delta_up=self.delta_up)
        one_of("DivergenceMask", ("tv", "kl"), divergence=self.divergence)
        not_below("DivergenceMask", 1, cap=self.cap)
        at_least("DivergenceMask", 1, top_k=self.top_k)

    @property
    def candidates(self) -> int:
        """How many ids the sampler records."""
        return self.top_k or 0

    def _options(self, actions: Actions) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        tokens = actions.tokens
        if tokens is None:
            raise RuntimeError("`DivergenceMask` needs the log-probs of tokens")
        if self.top_k and tokens.candidate_logprobs_BTK is None:
            raise RuntimeError("`DivergenceMask.top_k` needs candidates that the sampler recorded")
        return (tokens.logprobs_BT, tokens.anchor_logprobs_BT, actions.advantages_BU), {
            "delta": (self.delta, self.delta_up or self.delta),
            "divergence": self.divergence,
            "candidate_logprobs_BTK": tokens.candidate_logprobs_BTK if self.top_k else None,
            "behaviour_candidate_logprobs_BTK": tokens.anchor_candidate_logprobs_BTK
            if self.top_k
            else None,
        }

    def loss(self, actions: Actions) -> Tensor:
        tensors, options = self._options(actions)
        return F.divergence_mask(*tensors, cap=self.cap, **options)

    def clipped(self, actions: Actions) -> Tensor:
        tensors, options = self._options(actions)
        return outside_trust_region(*tensors, **options) & actions.mask_BU

    def measure(self, actions: Actions) -> Metrics:
        (now_BT, then_BT, _), options = self._options(actions)
        del options["delta"]
        return measure_trust(
            actions, self.clipped(actions), trust_divergence(now_BT, then_BT, **options), self.cap
        )

    def check(self, vocabulary: int) -> None:
        if self.candidates > vocabulary:
            raise UserError(
                f"`DivergenceMask.top_k` must be at most the vocabulary size {vocabulary}, got "
                f"{self.top_k}"
            )
