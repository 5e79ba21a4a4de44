"""Packs the rows of a micro-batch, so that responses to one prompt share its forward pass.

A packed line holds a prompt once and behind it the responses of its group. Each response token sees
the prompt and the earlier tokens of its own response only, and is numbered as if it stood right
behind the prompt, so that hidden states equal those of separate rows. The last token of a response
predicts nothing that is scored and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.types import Rollout


@dataclass(frozen=True)
class Lines:
    """R lines of length L, and the index of the hidden state that predicts each response token."""

    input_ids_RL: Tensor
    position_ids_RL: Tensor
    segment_RL: Tensor  # 0: prompt, 1…: responses, -1: padding
    index_BT: Tensor  # position in the flattened lines; 0 where masked
    shared: bool  # True if some line holds more than one response

    def attention_mask(self) -> Tensor | None:
        """Return the pairs that attend, bool `[R, 1, L, L]`; None: plain causal attention."""
        if not self.shared:
            return None
        L = self.input_ids_RL.shape[1]
        query, key = self.segment_RL[:, :, None], self.segment_RL[:, None, :]
        causal = torch.ones(L, L, dtype=torch.bool, device=key.device).tril()
        return (causal & ((key == 0) | (key == query)))[:, None]


def sees_everything(config: Any) -> bool:
    """Return True if each token attends to all before it: full attention, and no window."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and not getattr(config, "sliding_window", None)


def lay_out(rollout: Rollout, *, share: bool, hidden_size: int) -> Lines:
    """Pack a micro-batch, group by group where that costs less arithmetic than row by row.

    Args:
        rollout: rows to score; rows of one group carry one number in `group_B`.
        share: allow several responses in a line.
        hidden_size: D, which sets the cost of projections relative to attention.
    """
    check_padding(rollout)
    S = rollout.prompt_length
    prompt_tokens = rollout.attention_mask_BL[:, :S].sum(1).tolist()
    response_tokens = rollout.response_mask_BT.sum(1).tolist()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group_B.tolist()):
        groups.setdefault(group if share else row, []).append(row)
    lines: list[list[int]] = []
    for rows in groups.values():
        together = _pays(
            prompt_tokens[rows[0]], [response_tokens[row] for row in rows], hidden_size
        )
        lines += [rows] if together else [[row] for row in rows]
    return _fill(rollout, lines, prompt_tokens, response_tokens)


def check_padding(rollout: Rollout) -> None:
    """Refuse rows with gaps, prompts padded on the right, and responses padded on the left.

    Raises:
        UserError: a row with a gap, or padded on the other side.
    """
    S = rollout.prompt_length
    prompt_BS, response_BT = rollout.attention_mask_BL[:, :S], rollout.response_mask_BT
    for name, wrong, rule in (
        (
            "attention_mask_BL",
            (prompt_BS[:, :-1] & ~prompt_BS[:, 1:]).any(1),
            "prompts must be padded on the left",
        ),
        (
            "response_mask_BT",
            (response_BT[:, 1:] & ~response_BT[:, :-1]).any(1),
            "responses must be padded on the right",
        ),
    ):
        if wrong.any():
            raise UserError(
                f"`Rollout.{name}`: {rule} and without gaps; row {int(wrong.nonzero()[0])} is not"
            )


def _pays(prompt: int, responses: list[int], hidden_size: int) -> bool:
    """Compare multiply-adds per layer of one packed line with those of separate rows.

    Projections take about 12·D² per token, attention 2·D per pair of tokens.
    """

    def cost(tokens: int) -> int:
        return tokens * (6 * hidden_size + tokens)

    return cost(prompt + sum(responses)) < sum(cost(prompt + response) for response in responses)


def _fill(
    rollout: Rollout, lines: list[list[int]], prompts: list[int], responses: list[int]
) -> Lines:
    S, (B, T), device = (
        rollout.prompt_length,
        rollout.response_mask_BT.shape,
        rollout.tokens_BL.device,
    )
    # lines without tokens
    widths = [prompts[rows[0]] + sum(max(responses[row] - 1, 0) for row in rows) for rows in lines]
    R, L = len(lines), max(*widths, 1) if len(widths) > 1 else max(widths[0], 1)
    tokens_BL = rollout.tokens_BL.cpu()
    input_ids_RL = torch.zeros(R, L, dtype=torch.long)
    # padding has position 0: L may be longer than a table of positions
    position_ids_RL = torch.zeros(R, L, dtype=torch.long)
    segment_RL = torch.full((R, L), -1)
    index_BT = torch.zeros(B, T, dtype=torch.long)
    for r, rows in enumerate(lines):
        # the prompt
        s = prompts[rows[0]]
        input_ids_RL[r, :s] = tokens_BL[rows[0], S - s : S]
        position_ids_RL[r, :s] = torch.arange(s)
        segment_RL[r, :s] = 0
        # its responses, without their last tokens
        start = s
        for number, row in enumerate(rows, start=1):
            t = responses[row]
            stop = start + max(t - 1, 0)
            input_ids_RL[r, start:stop] = tokens_BL[row, S : S + stop - start]
            position_ids_RL[r, start:stop] = torch.arange(s, s + stop - start)
            segment_RL[r, start:stop] = number
            if t:
                index_BT[row, 0] = r * L + s - 1
                index_BT[row, 1:t] = r * L + torch.arange(start, stop)
            start = stop
    shared = any(len(rows) > 1 for rows in lines)
    return Lines(
        input_ids_RL.to(device),
        position_ids_RL.to(device),
        segment_RL.to(device),
        index_BT.to(device),
        shared,
    )
