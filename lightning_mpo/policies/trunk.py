"""The parts and states of a decoder that multi-token heads use, and new layers of its kind."""

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
                f"multi-token heads need a decoder with {', '.join(NEEDED)} (Llama, Qwen, Gemma, "
                f"Mistral); {type(self.decoder).__name__} has no {', '.join(missing)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the heads: float32, or float64 over a float64 trunk."""
        wide = self.embed_tokens.weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The trunk's embedding."""
        embedding: Any = self.decoder.embed_tokens
        return embedding

    @property
    def like(self) -> int:
        """The index of the layer that heads copy: the last one with full attention, or the last."""
        kinds = getattr(self.config, "layer_types", None) or []
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        return full[-1] if full else self.config.num_hidden_layers - 1

    def positions(self, hidden_RLD: Tensor, position_ids_RL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding's cosines and sines for a layer like `like`."""
        rotary: Any = self.decoder.rotary_emb
        if isinstance(
            getattr(rotary, "rope_type", None), dict
        ):  # Gemma 3 turns local and global layers differently
            return rotary(hidden_RLD, position_ids_RL, self.config.layer_types[self.like])
        return rotary(hidden_RLD, position_ids_RL)

    def new_layer(self) -> nn.Module:
        """Return a new layer, like the one at index `like`, that changes nothing at first."""
        index = self.like
        layers: Any = self.decoder.layers
        like = layers[index]
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
                        f"multi-token heads need decoder layers with {'.'.join(parts)}; "
                        f"{type(layer).__name__} has none"
                    )
                module = getattr(module, part)
            nn.init.zeros_(module.weight)
        return layer

    def new_unembedding(self) -> nn.Linear:
        """Return a trainable copy of the trunk's unembedding."""
        weight: Any = self.unembedding.weight
        if not weight.is_floating_point():
            raise UserError(
                "`own_unembedding` cannot copy a quantised unembedding; set `own_unembedding: "
                "false`"
            )
        copied = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=self.dtype)
        with torch.no_grad():
            copied.weight.copy_(weight)
        return copied


@dataclass(frozen=True)
class TrunkStates:
    """Hidden states of the lines of a micro-batch."""

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
    """Record the input of the decoder's final norm.

    Parallel heads are decoder layers and need the residual stream before that norm.
    """
    norm: Any = decoder.norm
    inputs: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()
