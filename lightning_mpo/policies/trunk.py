"""A decoder seen from the heads that stand on it: its parts, its states, and layers like its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lightning_mpo.policies.packing import Lines

NEEDED = ("layers", "norm", "rotary_emb", "embed_tokens")


@dataclass(frozen=True)
class Trunk:
    """The parts of a decoder that heads build on."""

    decoder: nn.Module
    config: PretrainedConfig  # of the text model
    unembedding: nn.Module

    def __post_init__(self) -> None:
        missing = [name for name in NEEDED if not hasattr(self.decoder, name)]
        if missing:
            raise UserError(
                f"multi-token heads need a decoder with {', '.join(NEEDED)} (Llama, Qwen, Gemma, Mistral); "
                f"{type(self.decoder).__name__} has no {', '.join(missing)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the heads: float32, or float64 over a float64 trunk."""
        wide = self.embed_tokens.weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The trunk's embedding."""
        return self.decoder.embed_tokens  # type: ignore[return-value]

    @property
    def like(self) -> int:
        """The layer that heads are made like: the last one with full attention, or the last."""
        kinds = getattr(self.config, "layer_types", None) or []
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        return full[-1] if full else self.config.num_hidden_layers - 1

    def positions(self, hidden_RLD: Tensor, position_ids_RL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding's cosines and sines for a layer like that one."""
        rotary: Any = self.decoder.rotary_emb
        if isinstance(
            getattr(rotary, "rope_type", None), dict
        ):  # Gemma 3 turns local and global layers differently
            return rotary(hidden_RLD, position_ids_RL, self.config.layer_types[self.like])
        return rotary(hidden_RLD, position_ids_RL)

    def new_layer(self) -> nn.Module:
        """Return a decoder layer like the last one with full attention, initialised to change nothing."""
        index = self.like
        like: Any = self.decoder.layers[index]  # type: ignore[index]
        layer = type(like)(self.config, layer_idx=index).to(self.dtype)
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parts in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            module = layer
            for part in parts:
                if not hasattr(module, part):
                    raise UserError(
                        f"multi-token heads need decoder layers with {'.'.join(parts)}; {type(layer).__name__} has none"
                    )
                module = getattr(module, part)
            nn.init.zeros_(module.weight)
        return layer

    def new_unembedding(self) -> nn.Linear:
        """Return a trainable copy of the trunk's unembedding."""
        weight: Any = self.unembedding.weight
        if not weight.is_floating_point():
            raise UserError(
                "`own_unembedding` cannot copy a quantised unembedding; set `own_unembedding: false`"
            )
        own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=self.dtype)
        with torch.no_grad():
            own.weight.copy_(weight)
        return own


@dataclass(frozen=True)
class TrunkStates:
    """What the trunk computed for the lines of a micro-batch."""

    before_norm_RLD: Tensor
    after_norm_RLD: Tensor
    lines: Lines

    def detached(self) -> TrunkStates:
        """The same values without gradient."""
        return replace(
            self,
            before_norm_RLD=self.before_norm_RLD.detach(),
            after_norm_RLD=self.after_norm_RLD.detach(),
        )


@contextmanager
def record_norm_input(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Record the input of the decoder's final norm: heads that are decoder layers need the residual stream before it."""
    seen: list[Tensor] = []
    handle = decoder.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    try:
        yield seen
    finally:
        handle.remove()
