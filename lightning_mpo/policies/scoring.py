"""From hidden states to what they say of response tokens: log-probs, entropies, ranks; now and some offsets ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.functional import heads, ranking, supports
from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.types import Rollout


class Likelihoods(NamedTuple):
    """What an unembedding says of response tokens; 0 where masked, candidates -inf."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    support_logits_BTK: Tensor | None = None
    candidate_logprobs_BTK: Tensor | None = None


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens to score, and where the hidden states stand that predict them."""

    mask_BT: Tensor
    index_BT: Tensor
    ids_BT: Tensor
    support_BTK: Tensor | None
    support_mask_BTK: Tensor | None
    candidates_BTK: Tensor | None = None
    candidate_mask_BTK: Tensor | None = None
    """Which slots hold a candidate."""

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
        """Return the tokens n places behind, predicted from the same hidden states, where the window is whole."""
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
        head: nn.Module | Unembedding,
        *,
        entropy: bool = True,
        entropy_grad: bool = False,
        logits: bool = False,
        candidates: bool = False,
        **options: Any,
    ) -> Likelihoods:
        """Return log-probs and entropies under one unembedding, on the stored support if there is one.

        Args:
            hidden_RLD: hidden states of the lines.
            head: the unembedding: a linear layer, plain or with a LoRA adapter, or what was read of one.
            entropy: whether the entropy is wanted.
            entropy_grad: whether it carries gradient.
            logits: whether the logits of the stored support are wanted, with gradient.
            candidates: whether the log-probs of the recorded candidates are wanted, without gradient.
            options: `temperature`, `scale` and `softcap` of `functional.heads`.

        Returns:
            Log-probs and entropies, each `[B, T]`; None or the logits, `[B, T, K]`, temperature applied; None or the
            log-probs of candidates, `[B, T, K]`. The first three are 0 where masked, logits also in slots that hold no
            id; candidates are -inf there, and where a support does not hold them.

        Raises:
            UserError: logits are asked for and no support is stored, or candidates and none are recorded.
        """
        mask_BT = self.mask_BT
        head = _read(head)
        hidden_nD = pick_hidden(hidden_RLD, self.index_BT[mask_BT])
        ids_n = self.ids_BT[mask_BT]
        options |= head.options | {"entropy_grad": entropy_grad}
        if candidates:
            asked, named = self._asked()
        if self.support_BTK is not None:
            slots = None if self.support_mask_BTK is None else self.support_mask_BTK[mask_BT]
            support = self.support_BTK[mask_BT]
            options |= {"support_mask_BTK": slots, "return_logits": logits or candidates}
            scores = heads.support_logprobs(hidden_nD, head.weight_VD, ids_n, support, **options)
        elif logits:
            raise UserError(
                "logits of the support need a stored one: give `support` as `TopK`, `Nucleus` or `MinP`"
            )
        else:
            if candidates:
                options |= {"candidates_BTK": asked, "candidates_grad": False}
            scores = heads.full_logprobs(
                hidden_nD, head.weight_VD, ids_n, entropy=entropy, **options
            )
        logprobs_n, entropy_n, *more = scores
        candidates_BTK = None
        if candidates:
            found = more.pop().detach()
            if self.support_BTK is not None:
                found = supports.logprobs_at(asked, support, found, slots)
            candidates_BTK = self._spread(found.masked_fill(~named, -torch.inf), -torch.inf)
        logits_BTK = self._spread(scores[2]) if logits else None
        return Likelihoods(
            self._spread(logprobs_n), self._spread(entropy_n), logits_BTK, candidates_BTK
        )

    def _asked(self) -> tuple[Tensor, Tensor]:
        """Return the candidates of the scored tokens, and which slots hold one; the others name id 0."""
        if self.candidates_BTK is None or self.candidate_mask_BTK is None:
            raise UserError(
                "the rollout records no candidates, which `surrogate` compares: sample with `candidates`"
            )
        named = self.candidate_mask_BTK[self.mask_BT]
        return self.candidates_BTK[self.mask_BT].masked_fill(~named, 0), named

    def _spread(self, values_n: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Put values of the scored tokens to their places. Shape `[B, T]` or `[B, T, K]`."""
        mask_BT, tail = self.mask_BT, values_n.shape[1:]
        empty = values_n.new_full((*mask_BT.shape, *tail), elsewhere)
        return empty.masked_scatter(mask_BT.view(*mask_BT.shape, *(1 for _ in tail)), values_n)

    def ranks(self, hidden_RLD: Tensor, head: nn.Module | Unembedding) -> Tensor:
        """Count the ids that are more probable than each token. Shape `[B, T]`, 0 where masked."""
        head = _read(head)
        hidden_BTD = pick_hidden(hidden_RLD, self.index_BT)
        return ranking.full_ranks(
            hidden_BTD, head.weight_VD, self.ids_BT, mask_BT=self.mask_BT, **head.options
        )

    def top_k(self, hidden_RLD: Tensor, head: nn.Module | Unembedding, k: int) -> Tensor:
        """Return the k most probable ids of the whole vocabulary. Shape `[B, T, k]`, int32, 0 where masked."""
        head = _read(head)
        hidden_BTD = pick_hidden(hidden_RLD, self.index_BT)
        return ranking.full_top_k(
            hidden_BTD, head.weight_VD, k, mask_BT=self.mask_BT, **head.options
        )


def _read(head: nn.Module | Unembedding) -> Unembedding:
    return head if isinstance(head, Unembedding) else Unembedding.of(head)


def pick_hidden(hidden_RLD: Tensor, index: Tensor) -> Tensor:
    """Return hidden states of places in the flattened lines, of the shape of `index` and D.

    Responses that share a prompt share its last state. `index_select` adds their gradients in the order of the index;
    indexing with brackets adds them in the order in which threads come to them, which rounds differently each time.
    """
    return hidden_RLD.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
