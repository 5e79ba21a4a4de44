"""A policy's head as the scoring functions need it: weight, bias, and the LoRA adapter on it if there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_mpo.errors import UserError
from lightning_mpo.functional.low_rank import LowRank


@dataclass(frozen=True)
class Unembedding:
    """Raw logits h Wᵀ + b, plus what an adapter adds. A snapshot: take a new one after adapters go on or off."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    adapter: LowRank | None = None

    @classmethod
    def of(cls, head: nn.Module) -> Unembedding:
        """Read a linear head, plain or under peft's LoRA, in its present state.

        Under `disable_adapter` the adapter is left out. Its dropout is on in train mode only.

        Raises:
            UserError: the head is quantised, or wrapped in a way that scoring does not know.
        """
        if type(head).__module__.startswith("peft."):
            return cls._adapted(head)
        weight: Any = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UserError(
                f"the head must be a linear layer in floating point, got {type(head).__name__}; leave a quantised head "
                "out of quantisation (`llm_int8_skip_modules`)"
            )
        bias: Any = getattr(head, "bias", None)
        return cls(weight, bias)

    @classmethod
    def _adapted(cls, head: Any) -> Unembedding:
        refuse_unknown_adapter(head)
        base = cls.of(head.base_layer)
        names = (
            []
            if head.disable_adapters
            else [name for name in head.active_adapters if name in head.lora_A]
        )
        if not names:
            return base
        (name,) = names
        down, up, dropout, factor = (
            part[name] for part in (head.lora_A, head.lora_B, head.lora_dropout, head.scaling)
        )
        bias_V = base.bias_V
        if up.bias is not None:
            bias_V = factor * up.bias + (0 if bias_V is None else bias_V)
        probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        return cls(base.weight_VD, bias_V, LowRank(down.weight, up.weight, factor, probability))

    def detached(self) -> Unembedding:
        """Return the same values without gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        adapter = self.adapter
        if adapter is not None:
            adapter = replace(
                adapter, down_RD=adapter.down_RD.detach(), up_VR=adapter.up_VR.detach()
            )
        return Unembedding(self.weight_VD.detach(), bias_V, adapter)

    @property
    def options(self) -> dict[str, Any]:
        """What `functional.heads` wants to know besides the weight."""
        return {"bias_V": self.bias_V, "adapter": self.adapter}

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Return raw logits of the whole vocabulary, float32 or float64, shape `[B, V]`."""
        raw_BV = linear(hidden_BD, self.weight_VD.to(hidden_BD.dtype))
        raw_BV = raw_BV.to(torch.promote_types(raw_BV.dtype, torch.float32))
        if self.bias_V is not None:
            raw_BV = raw_BV + self.bias_V
        if self.adapter is not None:
            with torch.autocast(hidden_BD.device.type, enabled=False):
                raw_BV = raw_BV + linear(self.adapter.inner(hidden_BD), self.adapter.up_VR)
        return raw_BV


def refuse_unknown_adapter(head: Any) -> None:
    """Refuse what peft may have put around a head, by name, unless it is one plain LoRA adapter."""
    from peft.tuners.lora.layer import Linear
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(head, AuxiliaryTrainingWrapper):
        raise UserError(
            f"the head is under peft's {type(head).__name__} (`modules_to_save`, `trainable_token_indices`), which "
            "scoring does not know; name it in `lora.targets` instead"
        )
    if type(head) is not Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise UserError(
            f"the head is under {kind}; on the head only LoRA over a plain linear layer is supported"
        )
    names = [name for name in head.active_adapters if name in head.lora_A]
    if len(names) > 1:
        raise UserError(
            f"the head has {len(names)} active adapters ({', '.join(names)}); only one can be scored"
        )
    for name in names:
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__
            raise UserError(
                f"the adapter {name!r} of the head is a {kind}; on the head only plain LoRA is supported"
            )
    if head.merged:
        raise UserError(
            "the head's adapter is merged into its weight; call `unmerge_adapter()` first"
        )
    if head.fan_in_fan_out:
        raise UserError(
            "the head's adapter has `fan_in_fan_out`, but the head is a linear layer; leave the option out"
        )
