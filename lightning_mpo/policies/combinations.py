"""Combinations of a policy's options that cannot be trained, found before weights are loaded."""

from __future__ import annotations

import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies.lora import Lora
from lightning_mpo.policies.mtp import MTPHeads
from lightning_mpo.policies.quantization import Quantization
from lightning_mpo.policies.value import Critic, SeparateCritic
from lightning_mpo.scores import ScoreRequest


def refuse_unserved(request: ScoreRequest, mtp: MTPHeads | None, critic: Critic | None) -> None:
    """Refuse a request for heads or values that a policy does not have.

    Raises:
        UserError: names the missing option.
    """
    offsets = 0 if mtp is None else mtp.offsets
    if request.future > offsets:
        available = (
            f"`policy.mtp` has {offsets}"
            if offsets
            else "the policy has none; give `policy.mtp` (-c mtp)"
        )
        raise UserError(
            f"blocks of {request.future + 1} tokens with `source: mtp`, or `HeadPolicyLoss` with "
            f"`offsets: {request.future}`, need {request.future} future offsets, but {available}"
        )
    if request.values and critic is None:
        raise UserError("`ValueLoss` needs `policy.critic`: give `ValueHead`, say (-c critic)")


def refuse_narrow_weights(dtype: torch.dtype, lora: Lora | None) -> None:
    """Refuse to train all weights in a dtype in which small updates round away.

    Raises:
        UserError: the dtype is not float32, and there are no adapters.
    """
    if lora is None and dtype != torch.float32:
        raise UserError(
            "`policy.dtype: bfloat16` without LoRA trains bfloat16 weights, in which updates round "
            "away; set `policy.dtype: float32` (with `trainer.precision: bf16-mixed` for speed), "
            "or give `policy.lora`"
        )


def refuse_untrainable_base(
    quantization: Quantization | None, lora: Lora | None, critic: Critic | None
) -> None:
    """Refuse to train weights that are stored in 4 bits.

    Raises:
        UserError: there are no adapters, or the critic would be a trained copy of the base.
    """
    if quantization is None:
        return
    if lora is None:
        raise UserError(
            "`policy.quantization` keeps the base in 4 bits, which cannot be trained; give "
            "`policy.lora` (`targets: all-linear`), or set `policy.quantization: null`"
        )
    if isinstance(critic, SeparateCritic):
        raise UserError(
            "`SeparateCritic` trains a copy of the trunk and `policy.quantization` leaves none "
            "that can be trained; use `ValueHead` (-c critic)"
        )
