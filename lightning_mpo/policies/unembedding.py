"""Reads the head of a network for the scoring functions: weight, bias, and a LoRA adapter on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_mpo.errors import UserError
from lightning_mpo.functional.head_logits import Head
from lightning_mpo.functional.low_rank import LowRank


@dataclass(frozen=True)
class Unembedding(Head):
    """The head of a network at one moment. Read it again after adapters go on or off."""

    @classmethod
    def of(cls, head: nn.Module, **form: Any) -> Unembedding:
        """Read a linear head, plain or under peft's LoRA, in its present state.

        Under `disable_adapter` the adapter is left out. Its dropout is on in train mode only.

        Args:
            head: the module.
            form: `temperature`, `scale` and `softcap` of `Head`.

        Raises:
            UserError: the head is quantised, or wrapped in a way that scoring does not know.
        """
        if type(head).__module__.startswith("peft."):
            return cls._adapted(head, form)
        weight: Any = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UserError(
                "the head must be a linear layer in floating point, got "
                f"{type(head).__name__}; leave a quantised head out of quantisation "
                "(`llm_int8_skip_modules`)"
            )
        bias: Any = getattr(head, "bias", None)
        return cls(weight, bias, **form)

    @classmethod
    def _adapted(cls, head: Any, form: dict[str, Any]) -> Unembedding:
        refuse_unknown_adapter(head)
        base = cls.of(head.base_layer, **form)
        active = [] if head.disable_adapters else head.active_adapters
        names = [name for name in active if name in head.lora_A]
        if not names:
            return base
        (name,) = names
        # the tensors of the one active adapter
        down, up, dropout, factor = (
            part[name] for part in (head.lora_A, head.lora_B, head.lora_dropout, head.scaling)
        )
        bias_V = base.bias_V
        if up.bias is not None:
            bias_V = factor * up.bias + (0 if bias_V is None else bias_V)
        probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        adapter = LowRank(down.weight, up.weight, factor, probability)
        return replace(base, bias_V=bias_V, adapter=adapter)

    def detached(self) -> Unembedding:
        """Return the same values without gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        adapter = self.adapter
        if adapter is not None:
            down_RD, up_VR = adapter.down_RD.detach(), adapter.up_VR.detach()
            adapter = replace(adapter, down_RD=down_RD, up_VR=up_VR)
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V, adapter=adapter)

    def raw_logits(self, hidden_BD: Tensor) -> Tensor:
        """Return h Wᵀ + b with the adapter, without scale and soft cap. Shape `[B, V]`."""
        raw_BV = linear(hidden_BD, self.weight_VD.to(hidden_BD.dtype))
        raw_BV = raw_BV.to(torch.promote_types(raw_BV.dtype, torch.float32))
        if self.bias_V is not None:
            raw_BV = raw_BV + self.bias_V
        if self.adapter is not None:
            with torch.autocast(hidden_BD.device.type, enabled=False):
                raw_BV = raw_BV + linear(self.adapter.inner(hidden_BD), self.adapter.up_VR)
        return raw_BV


def refuse_unknown_adapter(head: Any) -> None:
    """Refuse all wrappers of peft around a head except one plain LoRA adapter.

    Raises:
        UserError: names the wrapper.
    """
    from peft.tuners.lora.layer import Linear
    from peft.utils.other import AuxiliaryTrainingWrapper

    # the kind of the wrapper
    if isinstance(head, AuxiliaryTrainingWrapper):
        raise UserError(
            f"the head is under peft's {type(head).__name__} (`modules_to_save`, "
            "`trainable_token_indices`), which scoring does not know; name it in `lora.targets` "
            "instead"
        )
    if type(head) is not Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise UserError(
            f"the head is under {kind}; on the head only LoRA over a plain linear layer is "
            "supported"
        )
    # its adapters
    names = [name for name in head.active_adapters if name in head.lora_A]
    if len(names) > 1:
        raise UserError(
            f"the head has {len(names)} active adapters ({', '.join(names)}); only one can be "
            "scored"
        )
    for name in names:
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__
            raise UserError(
                f"the adapter {name!r} of the head is a {kind}; on the head only plain LoRA is "
                "supported"
            )
    # its state
    if head.merged:
        raise UserError(
            "the head's adapter is merged into its weight; call `unmerge_adapter()` first"
        )
    if head.fan_in_fan_out:
        raise UserError(
            "the head's adapter has `fan_in_fan_out`, but the head is a linear layer; leave the "
            "option out"
        )
