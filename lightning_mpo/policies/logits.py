"""How a family of models turns the unembedding's products into logits, and a check that this is the whole story."""

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
"""Names under which models scale logits in ways that are not known here."""


def logit_options(config: PretrainedConfig) -> dict[str, Any]:
    """Return `scale` and `softcap` of `functional.heads`, from the names that families use in their configurations.

    Raises:
        UserError: the configuration names a factor that is not known here.
    """
    for name in UNKNOWN:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"models of type {config.model_type!r} scale their logits by `{name}` ({getattr(config, name)}), which is "
                "not known here; choose a model whose logits are cap(scale · (h W + b))"
            )
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    caps = [cap for name in SOFT_CAPS if (cap := getattr(config, name, None))]
    return {"scale": scale, "softcap": caps[0] if caps else None}


@torch.no_grad()
def check_logits(network: PreTrainedModel, logits: Callable[[Tensor], Tensor]) -> None:
    """Compare what this project takes for a model's logits with the model's own, on a few tokens.

    Log-probs of training come from the unembedding's weight and bias, a factor and a soft cap. A model that does anything
    else to its logits would be trained on another distribution than the one it has.

    Args:
        network: in eval mode.
        logits: hidden states `[T, D]` to logits `[T, V]`.

    Raises:
        UserError: they differ.
    """
    config = network.config.get_text_config()
    ids = torch.arange(1, 5, device=network.device).remainder(config.vocab_size)[None]
    hidden_TD = network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    own_TV, expected_TV = (
        logits(hidden_TD),
        network(input_ids=ids, use_cache=False).logits[0].float(),
    )
    bound = (1e-3 if hidden_TD.dtype in (torch.float32, torch.float64) else 0.05) * float(
        expected_TV.abs().max()
    )
    gap = (
        float((own_TV - expected_TV).abs().max())
        if own_TV.shape == expected_TV.shape
        else float("inf")
    )
    if not gap <= bound:
        raise UserError(
            f"the logits of `{type(network).__name__}` are not cap(scale · (h W + b)) with the scale and soft cap of its "
            f"configuration (largest difference {gap:.3g}): its head applies a bias, cap or scale that is not known here, "
            "so that it cannot be trained"
        )
