"""Prompts that begin alike, such as the lines of one file: their common beginning is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

WORTH = 0.75
"""Sharing must compute at most this part of the padded prompt tokens that it replaces."""
LONGEST = 1.1
"""With sharing, a row of the cache may be at most this many times as long as the padded prompts."""


@dataclass(frozen=True)
class SharedPrefix:
    """A beginning that is computed once, and the rest of each prompt, its end.

    A prompt may begin with a part of the beginning alone. So prompt p is

        ids_L[:lengths_P[p]], ends_PU[p, mask_PU[p]]

    Here L is the length of the beginning and U that of the longest end. A row of the cache has L + U
    entries.

    Args:
        ids_L: ids of the beginning, shape `[L]`.
        lengths_P: number of these ids with which each prompt begins, shape `[P]`.
        ends_PU: the other ids of each prompt, at least one, padded on the left, shape `[P, U]`.
        mask_PU: which of `ends_PU` are ids of the prompt, bool, shape `[P, U]`.
    """

    ids_L: Tensor
    lengths_P: Tensor
    ends_PU: Tensor
    mask_PU: Tensor

    @property
    def seen_PS(self) -> Tensor:
        """Which entries of the cache a prompt sees, 1 or 0, shape `[P, L + U]`."""
        places_L = torch.arange(len(self.ids_L), device=self.ids_L.device)
        return torch.cat([places_L < self.lengths_P[:, None], self.mask_PU], dim=1).long()

    @property
    def positions_PU(self) -> Tensor:
        """Position of each id of `ends_PU` in its prompt."""
        return self.lengths_P[:, None] + (self.mask_PU.long().cumsum(1) - 1).clamp(min=0)


def shared_prefix(ids_PS: Tensor, mask_PS: Tensor) -> SharedPrefix | None:
    """Return the beginning that prompts share with the longest of them, and their ends.

    Args:
        ids_PS: prompts, padded on the left, shape `[P, S]`.
        mask_PS: which of `ids_PS` are ids of the prompt, bool, shape `[P, S]`.

    Returns:
        None if there is one prompt, or if sharing saves too little (`WORTH`, `LONGEST`).
    """
    P, S = ids_PS.shape
    lengths_P = mask_PS.sum(1)
    # prompts from their first token on
    places_S = torch.arange(S, device=ids_PS.device)
    from_first_PS = (places_S + (S - lengths_P)[:, None]).clamp(max=S - 1)
    left_PS = ids_PS.gather(1, from_first_PS)
    # tokens in common with the longest one; each prompt keeps its last token for its end
    same_PS = (left_PS == left_PS[lengths_P.argmax()]) & (places_S < lengths_P[:, None])
    common_P = torch.minimum(same_PS.long().cumprod(1).sum(1), lengths_P - 1)
    L, U = int(common_P.max()), int((lengths_P - common_P).max())
    if P == 1 or not L or L + P * U > WORTH * P * S or L + U > LONGEST * S:
        return None
    mask_PU = places_S[:U] >= U - (lengths_P - common_P)[:, None]
    trunk_L = left_PS[common_P.argmax(), :L]
    return SharedPrefix(trunk_L, common_P, ids_PS[:, S - U :], mask_PU)


def sees_all(config: Any, decoder: nn.Module | Callable[..., Any]) -> bool:
    """Return whether a prompt may skip entries of a model's cache, those of other prompts.

    Each layer must attend to all earlier tokens, and take their distances from their positions:
    MPT counts entries of the cache.

    Args:
        config: configuration of the language model.
        decoder: its network without the head.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        return False
    window = kinds is None and getattr(config, "sliding_window", None)
    local = "local" in getattr(config, "attention_layers", ())  # GPT-Neo
    placed = "position_ids" in signature(getattr(decoder, "forward", decoder)).parameters
    return placed and not window and not local
