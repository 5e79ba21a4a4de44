"""A KV cache with room to grow: a new token is written in place, without a copy of the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Tokens of spare room that a layer allocates when it runs out."""


class GrowingLayer(DynamicLayer):
    """Keys and values as views of a larger buffer, with the values of `DynamicLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions and return all of them, each `[B, heads, length, head size]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        stop = length + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            room = stop + ROOM
            self._buffers = (
                self._grown(self.keys, key_states, length, room),
                self._grown(self.values, value_states, length, room),
            )
        keys, values = self._buffers
        keys[..., length:stop, :], values[..., length:stop, :] = key_states, value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the buffers and of their spare room: the next token needs no copy."""
        if self._buffers is None:
            return super().batch_select_indices(indices)
        length = self.get_seq_length()
        keys, values = (part[indices] for part in self._buffers)
        self._buffers = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop positions from the end."""
        super().crop(tokens_to_remove)
        self._buffers = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._buffers = None

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor, length: int, room: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
        if old is not None and length:
            buffer[..., :length, :] = old
        return buffer


def growing_cache() -> Cache:
    """Return an empty cache whose layers appear as the model asks for them."""
    return Cache(layer_class_to_replicate=GrowingLayer)
