"""Prompts of several rows as one batch of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_mpo.data.lengths import encode_checked, too_long
from lightning_mpo.data.rendering import Renderer
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptBatch, PromptRow


def prompt_batch(renderer: Renderer, rows: Sequence[PromptRow], limit: int) -> PromptBatch:
    """Return the prompts of rows, padded on the left.

    Args:
        renderer: of the prompts.
        rows: the rows.
        limit: longest prompt in tokens.

    Raises:
        UserError: a prompt is empty, too long, or cannot be rendered.
    """
    # the tokens of each prompt
    ids = [encode_checked(renderer, row) for row in rows]
    for row, tokens in zip(rows, ids, strict=True):
        if len(tokens) > limit:
            raise UserError(too_long(row, len(tokens), limit))
    # mark rows whose prompt opens a thought
    encoded = [
        replace(row, thinking=True) if renderer.thinks(tokens) else row
        for row, tokens in zip(rows, ids, strict=True)
    ]
    return padded_batch(ids, encoded)


def padded_batch(ids: Sequence[Sequence[int]], rows: Sequence[PromptRow]) -> PromptBatch:
    """Return prompts as one batch, padded on the left.

    Args:
        ids: tokens of each prompt.
        rows: the rows of the prompts.
    """
    S = max(len(tokens) for tokens in ids)
    input_ids_PS = torch.zeros(len(ids), S, dtype=torch.long)
    attention_mask_PS = torch.zeros(len(ids), S, dtype=torch.bool)
    for i, tokens in enumerate(ids):
        input_ids_PS[i, S - len(tokens) :] = torch.tensor(tokens)
        attention_mask_PS[i, S - len(tokens) :] = True
    return PromptBatch(input_ids_PS, attention_mask_PS, tuple(rows))
