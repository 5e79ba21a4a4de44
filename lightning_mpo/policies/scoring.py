"""From hidden states to what they say of response tokens: log-probs, entropies, ranks; now and some offsets ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_mpo.functional import heads
from lightning_mpo.functional.actions import shift_left, window
from lightning_mpo.types import Rollout


class TokenLogprobs(NamedTuple):
    """What a head says of response tokens, 0 where masked."""

    logprobs_BT: Tensor  # nats
    entropy_BT: Tensor  # nats
    support_logits_BTK: Tensor | None = None


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens to score, and where the hidden states stand that predict them."""

    mask_BT: Tensor
    index_BT: Tensor
    ids_BT: Tensor
    support_BTK: Tensor | None
    slots_BTK: Tensor | None

    @classmethod
    def of(cls, rollout: Rollout, mask_BT: Tensor, index_BT: Tensor) -> ResponseTokens:
        """Take the responses of a rollout."""
        return cls(mask_BT, index_BT, rollout.responses_BT, rollout.support_BTK, rollout.support_mask_BTK)

    def ahead(self, n: int, *, keep_support: bool) -> ResponseTokens:
        """Return the tokens n places behind, predicted from the same hidden states, where the window is whole."""
        support_BTK, slots_BTK = (self.support_BTK, self.slots_BTK) if keep_support else (None, None)
        return ResponseTokens(
            window(self.mask_BT, n),
            self.index_BT,
            shift_left(self.ids_BT, n),
            None if support_BTK is None else shift_left(support_BTK, n),
            None if slots_BTK is None else shift_left(slots_BTK, n),
        )

    def logprobs(
        self,
        hidden_RLD: Tensor,
        head: Any,
        *,
        entropy: bool = True,
        entropy_grad: bool = False,
        logits: bool = False,
        **options: Any,
    ) -> TokenLogprobs:
        """Return log-probs and entropies under one unembedding, on the stored support if there is one.

        Args:
            hidden_RLD: hidden states of the lines.
            head: the unembedding, with `weight` and `bias`.
            entropy: whether the entropy is wanted.
            entropy_grad: whether it carries gradient.
            logits: whether all logits of the stored support are wanted.
            options: `temperature`, `scale` and `softcap` of `functional.heads`.
        """
        mask_BT = self.mask_BT
        hidden_nD = hidden_RLD.flatten(0, 1)[self.index_BT[mask_BT]]
        ids_n = self.ids_BT[mask_BT]
        options |= {"bias_V": head.bias, "entropy_grad": entropy_grad}
        if self.support_BTK is None:
            scores = heads.full_logprobs(hidden_nD, head.weight, ids_n, entropy=entropy, **options)[:2]
        else:
            slots = None if self.slots_BTK is None else self.slots_BTK[mask_BT]
            support = self.support_BTK[mask_BT]
            scores = heads.support_logprobs(
                hidden_nD, head.weight, ids_n, support, support_mask_BTK=slots, return_logits=logits, **options
            )
        return TokenLogprobs(*(_put(values, mask_BT) for values in scores))

    def ranks(self, hidden_RLD: Tensor, head: Any) -> Tensor:
        """Count the ids that are more probable than each token. Shape `[B, T]`, 0 where masked."""
        hidden_BTD = hidden_RLD.flatten(0, 1)[self.index_BT]
        return heads.full_ranks(hidden_BTD, head.weight, self.ids_BT, mask_BT=self.mask_BT, bias_V=head.bias)

    def top_k(self, hidden_RLD: Tensor, head: Any, k: int) -> Tensor:
        """Return the ids of the k largest logits where each token stands. int32 `[B, T, k]`, 0 where masked."""
        hidden_BTD = hidden_RLD.flatten(0, 1)[self.index_BT]
        return heads.full_top_k(hidden_BTD, head.weight, k, mask_BT=self.mask_BT, bias_V=head.bias)


def _put(values_n: Tensor, mask_BT: Tensor) -> Tensor:
    """Put values of the masked positions to their places."""
    empty = values_n.new_zeros(*mask_BT.shape, *values_n.shape[1:])
    places = mask_BT.view(*mask_BT.shape, *[1] * (values_n.ndim - 1)).expand_as(empty)
    return empty.masked_scatter(places, values_n)
