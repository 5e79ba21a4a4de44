"""From hidden states to log-probs, entropies and ranks of response tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional import heads, ranking, supports
from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.functional.head_logits import Head
from lightning_mpo.types import Rollout


class Likelihoods(NamedTuple):
    """Scores of response tokens under one head; 0 where masked, candidates -inf."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    support_logits_BTK: Tensor | None = None
    candidate_logprobs_BTK: Tensor | None = None


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens to score, and the indices of the hidden states that predict them."""

    mask_BT: Tensor
    index_BT: Tensor
    ids_BT: Tensor
    support_BTK: Tensor | None
    support_mask_BTK: Tensor | None
    candidates_BTK: Tensor | None = None
    candidate_mask_BTK: Tensor | None = None
    """True for slots that hold a candidate."""

    @classmethod
    def of(cls, rollout: Rollout, mask_BT: Tensor, index_BT: Tensor) -> ResponseTokens:
        """Take the responses of a rollout."""
        recorded_BTK = rollout.candidate_logprobs_BTK
        return cls(
            mask_BT,
            index_BT,
            rollout.responses_BT,
            rollout.support_BTK,
            rollout.support_mask_BTK,
            rollout.candidates_BTK,
            None if recorded_BTK is None else recorded_BTK > -torch.inf,
        )

    def ahead(self, n: int, *, keep_support: bool) -> ResponseTokens:
        """Return the tokens n positions later, which the same hidden states predict.

        Args:
            n: the offset.
            keep_support: keep the support that was stored at the later position.
        """
        support_BTK, support_mask_BTK = (
            (self.support_BTK, self.support_mask_BTK) if keep_support else (None, None)
        )
        return ResponseTokens(
            window(self.mask_BT, n),
            self.index_BT,
            shift_left(self.ids_BT, n),
            None if support_BTK is None else shift_left(support_BTK, n),
            None if support_mask_BTK is None else shift_left(support_mask_BTK, n),
        )

    def logprobs(
        self,
        hidden_RLD: Tensor,
        head: Head,
        *,
        entropy: bool = True,
        entropy_grad: bool = False,
        logits: bool = False,
        candidates: bool = False,
    ) -> Likelihoods:
        """Return log-probs and entropies under one head, on the stored support if there is one.

        Args:
            hidden_RLD: hidden states of the lines.
            head: the unembedding, temperature included.
            entropy: compute the entropy.
            entropy_grad: give it a gradient.
            logits: return the logits of the stored support, with gradient.
            candidates: return the log-probs of the recorded candidates, without gradient.

        Returns:
            Log-probs and entropies, each `[B, T]`; logits and log-probs of candidates, `[B, T, K]`
            or None. Masked tokens and logits of empty slots are 0. Candidates are -inf where
            masked, in empty slots and outside a support.

        Raises:
            UserError: no support is stored, or no candidates are recorded.
        """
        whole_BT = self._whole_BT
        if whole_BT is not None and bool(whole_BT.any()):
            return self._by_step(whole_BT, hidden_RLD, head, entropy, entropy_grad)
        hidden_nD = pick_hidden(hidden_RLD, self.index_BT[self.mask_BT])
        if self.support_BTK is not None:
            return self._on_support(hidden_nD, head, entropy_grad, logits, candidates)
        if logits:
            raise UserError(
                "logits of the support need a stored one: give `support` as `TopK`, `Nucleus` or "
                "`MinP`"
            )
        # the whole vocabulary, with the recorded candidates or without
        ids_n = self.ids_BT[self.mask_BT]
        options: dict[str, Any] = {"entropy": entropy, "entropy_grad": entropy_grad}
        if not candidates:
            logprobs_n, entropy_n = heads.full_logprobs(hidden_nD, head, ids_n, **options)
            return Likelihoods(self._spread(logprobs_n), self._spread(entropy_n))
        candidates_nK, present_nK = self._recorded_candidates()
        options |= {"candidates_BTK": candidates_nK, "candidates_grad": False}
        logprobs_n, entropy_n, values_nK = heads.full_logprobs(hidden_nD, head, ids_n, **options)
        return Likelihoods(
            self._spread(logprobs_n),
            self._spread(entropy_n),
            candidate_logprobs_BTK=self._spread_candidates(values_nK, present_nK),
        )

    @property
    def _whole_BT(self) -> Tensor | None:
        """Tokens with a stored support that has no id: the whole vocabulary; None: no support."""
        if self.support_mask_BTK is None:
            return None
        return self.mask_BT & ~self.support_mask_BTK.any(-1)

    def _by_step(
        self, whole_BT: Tensor, hidden_RLD: Tensor, head: Head, entropy: bool, entropy_grad: bool
    ) -> Likelihoods:
        """Score tokens of the whole vocabulary and tokens on their supports, each by its head."""
        options = {"entropy": entropy, "entropy_grad": entropy_grad}
        whole = replace(self, mask_BT=whole_BT, support_BTK=None, support_mask_BTK=None)
        parts = [whole.logprobs(hidden_RLD, head, **options)]
        if bool((rest_BT := self.mask_BT & ~whole_BT).any()):
            parts.append(replace(self, mask_BT=rest_BT).logprobs(hidden_RLD, head, **options))
        # each part is 0 at the tokens of the other
        logprobs_BT, entropy_BT = (
            torch.stack([getattr(part, name) for part in parts]).sum(0)
            for name in ("logprobs_BT", "entropy_BT")
        )
        return Likelihoods(logprobs_BT, entropy_BT)

    def _on_support(
        self, hidden_nD: Tensor, head: Head, entropy_grad: bool, logits: bool, candidates: bool
    ) -> Likelihoods:
        """Score on the stored support; arguments as in `logprobs`."""
        assert self.support_BTK is not None
        if candidates:
            candidates_nK, present_nK = self._recorded_candidates()
        # the stored slots
        slots_nK = None if self.support_mask_BTK is None else self.support_mask_BTK[self.mask_BT]
        support_nK = self.support_BTK[self.mask_BT]
        scores = heads.support_logprobs(
            hidden_nD,
            head,
            self.ids_BT[self.mask_BT],
            support_nK,
            support_mask_BTK=slots_nK,
            entropy_grad=entropy_grad,
            return_logits=logits or candidates,
        )
        # log-probs of candidates from the logits of the support
        candidates_BTK = None
        if candidates:
            logits_nK = scores[2].detach()
            values_nK = supports.logprobs_at(candidates_nK, support_nK, logits_nK, slots_nK)
            candidates_BTK = self._spread_candidates(values_nK, present_nK)
        logits_BTK = self._spread(scores[2]) if logits else None
        return Likelihoods(
            self._spread(scores[0]), self._spread(scores[1]), logits_BTK, candidates_BTK
        )

    def _recorded_candidates(self) -> tuple[Tensor, Tensor]:
        """Return the candidates of the scored tokens, 0 in empty slots, and the mask of slots."""
        if self.candidates_BTK is None or self.candidate_mask_BTK is None:
            raise UserError(
                "the rollout records no candidates, which `surrogate` compares: sample with "
                "`candidates`"
            )
        present_nK = self.candidate_mask_BTK[self.mask_BT]
        return self.candidates_BTK[self.mask_BT].masked_fill(~present_nK, 0), present_nK

    def _spread_candidates(self, values_nK: Tensor, present_nK: Tensor) -> Tensor:
        values_nK = values_nK.detach().masked_fill(~present_nK, -torch.inf)
        return self._spread(values_nK, -torch.inf)

    def _spread(self, values_n: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Scatter values of the scored tokens. Shape `[B, T]` or `[B, T, K]`."""
        mask_BT, tail = self.mask_BT, values_n.shape[1:]
        empty = values_n.new_full((*mask_BT.shape, *tail), elsewhere)
        return empty.masked_scatter(mask_BT.view(*mask_BT.shape, *(1 for _ in tail)), values_n)

    def ranks(self, hidden_RLD: Tensor, head: Head) -> Tensor:
        """Count the ids that are more probable than each token. Shape `[B, T]`, 0 where masked."""
        hidden_BTD = pick_hidden(hidden_RLD, self.index_BT)
        return ranking.full_ranks(hidden_BTD, head, self.ids_BT, mask_BT=self.mask_BT)

    def top_k(self, hidden_RLD: Tensor, head: Head, k: int) -> Tensor:
        """Return the k most probable ids. Shape `[B, T, k]`, int32, 0 where masked."""
        hidden_BTD = pick_hidden(hidden_RLD, self.index_BT)
        return ranking.full_top_k(hidden_BTD, head, k, mask_BT=self.mask_BT)

    def most_probable(self, hidden_RLD: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """Return the most probable id of each token's support, or of the vocabulary, and its log-prob.

        Returns:
            Ids and log-probs, each `[B, T]`, 0 where masked.
        """
        if self.support_BTK is None:
            ids_BT = self.top_k(hidden_RLD, head, 1)[..., 0].to(self.ids_BT.dtype)
            best = replace(self, ids_BT=ids_BT).logprobs(hidden_RLD, head, entropy=False)
            return ids_BT, best.logprobs_BT
        # on the stored support
        logits_BTK = self.logprobs(hidden_RLD, head, logits=True).support_logits_BTK
        assert logits_BTK is not None
        if self.support_mask_BTK is not None:
            logits_BTK = logits_BTK.masked_fill(~self.support_mask_BTK, -torch.inf)
        logprobs_BT, slot_BT = logits_BTK.log_softmax(-1).max(-1)
        ids_BT = self.support_BTK.gather(-1, slot_BT[..., None])[..., 0].to(self.ids_BT.dtype)
        return ids_BT * self.mask_BT, torch.where(self.mask_BT, logprobs_BT, 0)


def pick_hidden(hidden_RLD: Tensor, index: Tensor) -> Tensor:
    """Return hidden states at indices into the flattened lines. The shape of `index`, and D.

    Responses that share a prompt share its last state. `index_select` adds their gradients in the
    order of the index. Indexing with brackets adds them in the order of the threads, which rounds
    differently each time.
    """
    return hidden_RLD.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
