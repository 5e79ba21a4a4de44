"""Facts of masked language models, and refusals of those that cannot be trained as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.policies.masked_inputs import MaskForm
from lightning_mpo.policies.model_kinds import ModelKind
from lightning_mpo.policies.packing import sees_everything
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.scores import ScoreRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lightning_mpo.policies.loaded import LoadedPolicy


def find_mask(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, text: str | None, source: str
) -> int:
    """Return the id of MASK.

    Args:
        tokenizer: of the model.
        config: of the model; may name `mask_token_id`.
        text: the text of MASK; None: the model's.
        source: name of the model, for messages.

    Raises:
        UserError: the model names no mask token, or the text is no token of it.
    """
    vocabulary = config.get_text_config().vocab_size
    if text is not None:
        id = tokenizer.get_vocab().get(text)
        if id is None or id >= vocabulary:
            raise UserError(
                f"`policy.mask_token` {text!r} is no token of the model {source!r}; its tokenizer "
                f"names {tokenizer.mask_token!r}"
            )
        return int(id)
    mask: Any = tokenizer.mask_token_id
    if mask is None:
        mask = getattr(config, "mask_token_id", None)
    if not isinstance(mask, int) or not 0 <= mask < vocabulary:
        raise UserError(
            f"the model {source!r} names no mask token, which a masked policy puts at hidden "
            "positions; give `policy.mask_token`, or use `CausalPolicy`"
        )
    return mask


def check_mask(
    tokenizer: PreTrainedTokenizerBase,
    mask_id: int,
    end_tokens: Sequence[int],
    given: str | None,
    source: str,
) -> None:
    """Refuse a MASK that prompts or responses hold; warn if the user chose a token of texts.

    Args:
        tokenizer: of the model.
        mask_id: id of MASK.
        end_tokens: ids that end a response.
        given: the text of MASK that the user gave; None: the model names it.
        source: name of the model, for messages.

    Raises:
        UserError: the token ends responses, begins prompts, stands for unknown characters, or is an
            ordinary token that the user did not give.
    """
    text = tokenizer.convert_ids_to_tokens(mask_id)
    mask, remedy = (
        f"the mask token {text!r} ({mask_id}) of the model {source!r}",
        ("give `policy.mask_token`, the text of a token of its own"),
    )
    if mask_id in end_tokens:
        raise UserError(f"{mask} ends responses as well; {remedy}")
    if mask_id in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        raise UserError(f"{mask} begins prompts as well; {remedy}")
    if mask_id == tokenizer.unk_token_id:
        raise UserError(f"{mask} stands for unknown characters as well; {remedy}")
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if text is None or mask_id in special:
        return
    if given is None:
        raise UserError(
            f"{mask}, which its configuration names, is an ordinary token, so that texts may hold "
            f"it; {remedy}"
        )
    rank_zero_warn(
        f"`policy.mask_token` {given!r} is an ordinary token of the model {source!r}: in a prompt "
        "it stands for a hidden token, and no response can hold it; give a special or an added "
        "token if the model has one"
    )


def refuse_causal_requests(request: ScoreRequest) -> None:
    """Refuse scores that need the chain rule of a causal model.

    Raises:
        UserError: the request needs heads, values or alternatives of tokens.
    """
    if request.future:
        raise UserError(
            "multi-token heads predict the tokens behind the next one, and a masked policy has no "
            "next token; use `actions` and loss terms without heads, or `CausalPolicy`"
        )
    if request.values:
        raise UserError(
            "`ValueLoss` fits a critic to states from left to right, and a masked policy has none "
            "of these; leave it out, or use `CausalPolicy`"
        )
    if request.support_logits or request.candidates:
        raise UserError(
            "a masked policy scores the tokens of a response alone, not their alternatives; use a "
            "surrogate and a KL estimator of sampled tokens, such as `ClippedRatio`"
        )


def refuse_networks(policy: LoadedPolicy) -> None:
    """Refuse models that cannot predict hidden tokens from both sides.

    Raises:
        UserError: the model has such a property, which the message names.
    """
    config, source = policy.config, policy.source
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"the model {source!r} has an encoder and a decoder; a masked policy needs one stack "
            "of layers, as in BERT"
        )
    if policy.head_options["softcap"]:
        raise UserError(
            f"the model {source!r} caps its logits, so that ids cannot be barred; choose a model "
            "without a soft cap"
        )
    network: Any = policy.outline_network()
    if policy.gradient_checkpointing and not network.supports_gradient_checkpointing:
        raise UserError(
            f"`{type(network).__name__}` cannot recompute activations; set "
            "`policy.gradient_checkpointing: false`"
        )
    if policy.kind.foreign(config):
        return
    causal = not policy.kind.masked_family(config)
    windowed = causal and not sees_everything(text)
    steps = causal and not (network._supports_sdpa and not network._is_stateful)
    if windowed or steps or getattr(text, "is_decoder", False):
        raise UserError(
            f"the model {source!r} ({type(network).__name__}) does not attend to all tokens of a "
            "row from each position, which a masked policy needs; choose a model with full "
            "attention"
        )


def mask_forms(kind: ModelKind, config: PretrainedConfig) -> list[MaskForm]:
    """Return the forms of attention masks that a model may take."""
    if kind.foreign(config):
        return [MaskForm.PAIRS, MaskForm.KEYS, MaskForm.NONE]
    return [MaskForm.KEYS if kind.masked_family(config) else MaskForm.PAIRS]


def trial_ids(vocabulary: int, barred: Sequence[int], mask_id: int) -> list[int]:
    """Return six ids for trials; the last one is MASK, and the others are not barred."""
    ids = [id for id in range(min(vocabulary, len(barred) + 8)) if id not in barred][-5:]
    return [*(ids * 5)[:5], mask_id]


def bar(
    head: Unembedding, around_V: Tensor | None, barred: Sequence[int], logit: float
) -> Unembedding:
    """Return a head whose bias includes a bias around it, and gives barred ids a low logit.

    Args:
        head: with or without a bias.
        around_V: bias that the network adds behind the head.
        barred: ids that must not be drawn.
        logit: of barred ids, after scale and temperature.
    """
    bias_V = head.bias_V if around_V is None else around_V
    weight_VD = head.weight_VD
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    if bias_V is None:
        bias_V = torch.zeros(weight_VD.shape[0], device=weight_VD.device, dtype=wide)
    ids = torch.tensor(barred, device=bias_V.device, dtype=torch.long)
    raw = logit * head.temperature / head.scale
    return replace(head, bias_V=bias_V.to(wide).index_fill(0, ids, raw))


def compare_logits(
    name: str, used_LV: Tensor, network_LV: Tensor, barred: Sequence[int], tolerance: float
) -> None:
    """Refuse a network whose own logits are not those that a policy scores with.

    Args:
        name: class of the network, for messages.
        used_LV: logits of the policy.
        network_LV: logits of the network, which counts positions itself.
        barred: ids that are not compared.
        tolerance: largest difference by rounding, relative to the largest logit.

    Raises:
        UserError: they differ.
    """
    gap, largest = float("inf"), float(network_LV.abs().max())
    if used_LV.shape == network_LV.shape:
        ids = torch.tensor(barred, device=used_LV.device, dtype=torch.long)
        gap = float((used_LV - network_LV).index_fill(1, ids, 0).abs().max())
    if not gap <= tolerance * largest:
        raise UserError(
            f"the logits of `{name}` are not scale · (h W + b) with the scale of its "
            "configuration, or it does not count positions from the first token (largest "
            f"difference {gap:.3g}), so that it cannot be trained; choose another model"
        )
