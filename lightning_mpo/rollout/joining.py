"""Joins rollouts of different widths into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_mpo.types import NEVER, Rollout

_FILLING = {"kept_mass_BT": 1.0, "reveal_BT": NEVER}
"""Padding value by field, where it is not 0."""


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Put rollouts below each other, rows in their order.

    Prompts are padded on the left, responses on the right, and supports with empty slots. Groups
    are renumbered, so that groups of different parts stay distinct.

    Args:
        parts: the rollouts, at least one.

    Raises:
        ValueError: there is no part, or only some parts have a field such as supports, kept mass,
            texts or prompt rows.
    """
    if not parts:
        raise ValueError("`parts` must hold at least one rollout, got none")
    parts = _with_masks(parts)
    # common widths
    S, T = (
        max(part.prompt_length for part in parts),
        max(part.response_mask_BT.shape[1] for part in parts),
    )
    K = max(part.support_BTK.shape[2] if part.support_BTK is not None else 0 for part in parts)
    # field by field
    joined: dict[str, Any] = {"group_B": _groups(parts)}
    for item in fields(Rollout):
        if item.name in joined:
            continue
        values = [getattr(part, item.name) for part in parts]
        if isinstance(values[0], tuple):
            joined[item.name] = _join_tuples(item.name, values, parts)
        elif any(value is None for value in values):
            if any(value is not None for value in values):
                raise ValueError(
                    f"`parts` must agree on `{item.name}`: some have it and some have not"
                )
        else:
            widened = [
                _widen(item.name, value, part, (S, T, K))
                for value, part in zip(values, parts, strict=True)
            ]
            joined[item.name] = torch.cat(widened)
    return Rollout(**joined)


def _with_masks(parts: Sequence[Rollout]) -> list[Rollout]:
    """Replace masks that are None by tensors, if another part has such a mask."""
    any_empty_slots = any(part.support_mask_BTK is not None for part in parts)
    sizes = {part.support_BTK.shape[2] for part in parts if part.support_BTK is not None}
    any_outside = any(part.outside_BT is not None for part in parts)
    masked_parts = []
    for part in parts:
        if (
            part.support_BTK is not None
            and part.support_mask_BTK is None
            and (any_empty_slots or len(sizes) > 1)
        ):
            part = replace(
                part, support_mask_BTK=torch.ones_like(part.support_BTK, dtype=torch.bool)
            )
        if any_outside and part.outside_BT is None:
            part = replace(part, outside_BT=torch.zeros_like(part.response_mask_BT))
        masked_parts.append(part)
    return masked_parts


def _groups(parts: Sequence[Rollout]) -> Tensor:
    """Return the group of each row, numbered from 0 over all parts."""
    numbers, start = [], 0
    for part in parts:
        groups, number_B = part.group_B.unique(return_inverse=True)
        numbers.append(number_B + start)
        start += len(groups)
    return torch.cat(numbers)


def _join_tuples(
    name: str, values: list[tuple[Any, ...]], parts: Sequence[Rollout]
) -> tuple[Any, ...]:
    if not any(values):
        return ()
    if any(len(value) != len(part.group_B) for value, part in zip(values, parts, strict=True)):
        raise ValueError(f"`parts` must agree on `{name}`: some have it and some have not")
    return sum(values, ())


def _widen(name: str, value: Tensor, part: Rollout, sizes: tuple[int, int, int]) -> Tensor:
    """Pad one field to S prompt columns, T response columns and K slots."""
    S, T, K = sizes
    suffix, right = name.rsplit("_", 1)[-1], T - part.response_mask_BT.shape[1]
    # every part has the same number of candidates
    slots = K - value.shape[-1] if name.startswith("support") else 0
    padding: tuple[int, ...] = {
        "BL": (S - part.prompt_length, right),
        "BT": (0, right),
        "BTK": (0, slots, 0, right),
        "BCL": (S - part.prompt_length, right),
        "BCT": (0, right),
    }.get(suffix, ())
    return pad(value, padding, value=_FILLING.get(name, 0)) if any(padding) else value
