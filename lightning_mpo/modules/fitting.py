"""Whether prompts and responses fit the model: its positions, and its table of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.errors import UserError
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies.base import Policy
from lightning_mpo.types import PromptRow


def check_fit(
    policy: Policy,
    data: Any,
    rows: Sequence[PromptRow],
    max_new_tokens: int,
    option: str = "rollout.max_new_tokens",
) -> None:
    """Refuse rows that the model has no positions or no embeddings for.

    Args:
        policy: not built yet.
        data: a data module that has the policy's tokenizer, and knows its longest prompt.
        rows: that will be sampled.
        max_new_tokens: the longest response.
        option: that sets it, for messages.

    Raises:
        UserError: the longest prompt and the longest response are more tokens than positions, or a
            prompt holds a token without an embedding.
    """
    check_length(policy.positions, data.longest_prompt, max_new_tokens, option)
    unembedded = policy.unembedded
    for row in rows if unembedded else ():
        text = repr(row)
        if not any(token in text for token in unembedded):
            continue
        highest = int(data.encode([row]).input_ids_PS.max())
        if highest >= policy.vocabulary:
            token = next(text for text, id in unembedded.items() if id == highest)
            raise UserError(
                f"the prompt {row.prompt[:60]!r} holds the token {token!r} ({highest}), and the "
                f"model has embeddings for {policy.vocabulary} tokens only: take the token out, "
                "or a model whose embeddings were resized"
            )


def check_length(positions: int | None, longest: int, max_new_tokens: int, option: str) -> None:
    """Refuse responses that have no positions behind the longest prompt.

    Args:
        positions: most tokens of a row; None: no limit.
        longest: tokens of the longest prompt.
        max_new_tokens: the longest response.
        option: that sets it, for messages.

    Raises:
        UserError: both together are more tokens than positions.
    """
    if positions is None or longest + max_new_tokens <= positions:
        return
    room = positions - longest
    remedy = f"set `{option}` to at most {room}, or " if room > 0 else ""
    raise UserError(
        f"the longest prompt has {longest} tokens and `{option}` is {max_new_tokens}, together "
        f"more than the model's {positions} positions: {remedy}drop long prompts "
        "(`data.max_prompt_tokens`)"
    )


def warn_of_untrained_heads(policy: Policy, objective: Objective) -> None:
    """Warn if the loss uses multi-token heads that no stage has trained."""
    if objective.request.future and "mtp" in policy.cold_parts:
        rank_zero_warn(
            "`policy.mtp` start untrained, so that the log-ratios of future offsets say little; "
            "warm them up with `HeadWarmup` first (-c quickstart_mtp_warmup) and give "
            "`policy.checkpoint`"
        )
