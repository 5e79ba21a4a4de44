"""The tokens that end a response, as tokenizer, configuration and generation options name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def find_end_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    generation_ends: list[Any],
    separator: int | None = None,
) -> dict[int, str]:
    """Return all end tokens of a model, each with the file that names it first.

    Args:
        source: name of the model, for messages.
        tokenizer: its tokenizer.
        config: configuration of its text model.
        generation_ends: `eos_token_id` of generation_config.json, as a list.
        separator: the end token of a model that names none.

    Raises:
        UserError: no end token is named, or one that is no token of the model.
    """
    # names, in the order of the files
    configured = config.eos_token_id
    candidates: list[tuple[Any, str]] = [(tokenizer.eos_token_id, "the tokenizer")]
    candidates += [
        (end, "config.json")
        for end in (configured if isinstance(configured, list) else [configured])
    ]
    candidates += [(end, "generation_config.json") for end in generation_ends]
    if separator is not None and not any(end is not None for end, _ in candidates):
        candidates.append((separator, "the tokenizer"))
    # valid ones, each once
    ends: dict[int, str] = {}
    for end, file in candidates:
        if end is None:
            continue
        if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < config.vocab_size:
            raise UserError(
                f"the model {source!r}: {file} names the end token {end!r}, which is none of the "
                f"model's {config.vocab_size} tokens; correct `eos_token_id`"
            )
        ends.setdefault(end, file)
    if not ends:
        raise UserError(
            f"the model {source!r} names no token that ends a response: set `eos_token` in "
            "tokenizer_config.json or `eos_token_id` in generation_config.json"
        )
    return ends
