"""The step from the unembedding's products to logits in each family of models, and its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Cohere, Falcon-H1."""
DIVISORS = ("logits_scaling",)
"""Granite."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma, RecurrentGemma, xLSTM."""
UNKNOWN = ("output_multiplier", "logits_mup_width_multiplier", "dim_model_base")
"""Options that scale logits in ways that are not known here."""


def logit_options(config: PretrainedConfig) -> dict[str, Any]:
    """Return `scale` and `softcap` of a head, under the names of each family's configuration.

    Raises:
        UserError: the configuration names a factor that is not known here.
    """
    for name in UNKNOWN:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"models of type {config.model_type!r} scale their logits by `{name}` "
                f"({getattr(config, name)}), which is not known here; choose a model whose logits "
                "are cap(scale · (h W + b))"
            )
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    caps = [cap for name in SOFT_CAPS if (cap := getattr(config, name, None))]
    return {"scale": scale, "softcap": caps[0] if caps else None}


def scaled_and_capped(products_BV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return softcap · tanh(scale · products / softcap), the logits of each family of models.

    Args:
        products_BV: of hidden states and the unembedding.
        scale: factor.
        softcap: bound of the logits; None: none.
    """
    logits_BV = products_BV if scale == 1.0 else products_BV * scale
    return softcap * torch.tanh(logits_BV / softcap) if softcap else logits_BV


@torch.no_grad()
def check_logits(network: PreTrainedModel, logits: Callable[[Tensor], Tensor]) -> None:
    """Compare the logits that training uses with those of the model itself, on a few tokens.

    Log-probs of training come from the unembedding's weight and bias, a factor and a soft cap. A
    model that does anything else to its logits would be trained on another distribution than the
    one it has.

    Args:
        network: in eval mode.
        logits: hidden states `[T, D]` to logits `[T, V]`.

    Raises:
        UserError: they differ.
    """
    config = network.config.get_text_config()
    ids = torch.arange(1, 5, device=network.device).remainder(config.vocab_size)[None]
    hidden_TD = network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    used_TV = logits(hidden_TD)
    expected_TV = network(input_ids=ids, use_cache=False).logits[0].float()
    # rounding apart, both are the same
    is_wide = hidden_TD.dtype in (torch.float32, torch.float64)
    bound = (1e-3 if is_wide else 0.05) * float(expected_TV.abs().max())
    gap = float("inf")
    if used_TV.shape == expected_TV.shape:
        gap = float((used_TV - expected_TV).abs().max())
    if not gap <= bound:
        raise UserError(
            f"the logits of `{type(network).__name__}` are not cap(scale · (h W + b)) with the "
            f"scale and soft cap of its configuration (largest difference {gap:.3g}): its head "
            "applies a bias, cap or scale that is not known here, so that it cannot be trained"
        )
