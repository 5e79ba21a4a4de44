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
    """Pack a micro-batch: 1, 2, 4, … responses of a group in a line, whichever costs least.

    Args:
        rollout: rows to score; rows of one group carry one number in `group_B`.
        share: allow several responses in a line.
        hidden_size: D, which sets the cost of projections relative to attention.
    """
    check_padding(rollout)
    prompts = rollout.attention_mask_BL[:, : rollout.prompt_length].sum(1).tolist()
    responses = rollout.response_mask_BT.sum(1).tolist()
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group_B.tolist()):
        groups.setdefault(group, []).append(row)
    largest = max((len(rows) for rows in groups.values()), default=1) if share else 1
    per_line = [1]
    while per_line[-1] < largest:
        per_line.append(min(2 * per_line[-1], largest))
    layouts = [
        [line for rows in groups.values() for line in _cut(rows, responses, size)]
        for size in per_line
    ]
    costs = [_cost(_widths(lines, prompts, responses), lines, hidden_size) for lines in layouts]
    return _fill(rollout, layouts[costs.index(min(costs))], prompts, responses)


def _cut(rows: list[int], responses: list[int], size: int) -> list[list[int]]:
    """Distribute the rows of a group over lines of at most `size` rows and about equal lengths."""
    lines: list[list[int]] = [[] for _ in range(-(-len(rows) // size))]
    for row in sorted(rows, key=lambda row: -responses[row]):
        shortest = min(
            (line for line in lines if len(line) < size),
            key=lambda line: sum(responses[other] for other in line),
        )
        shortest.append(row)
    return [sorted(line) for line in lines]


def _widths(lines: list[list[int]], prompts: list[int], responses: list[int]) -> list[int]:
    """Return the tokens of each line; the last token of a response is left out."""
    return [prompts[rows[0]] + sum(max(responses[row] - 1, 0) for row in rows) for rows in lines]


def _cost(widths: list[int], lines: list[list[int]], hidden_size: int) -> int:
    """Return the multiply-adds per layer of padded lines, in units of 2·D.

    Projections take about 6·D a token. A pair of tokens counts 2, as attention is slower than
    projections: at D = 896 on a CPU 1 time in float32 and 4 to 6 times in bfloat16 (measured). Plain
    causal attention skips half of the pairs.
    """
    shared = any(len(rows) > 1 for rows in lines)
    length = max(widths, default=0)
    return len(lines) * length * (6 * hidden_size + (2 if shared else 1) * length)


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


def _fill(
    rollout: Rollout, lines: list[list[int]], prompts: list[int], responses: list[int]
) -> Lines:
    S, (B, T), device = (
        rollout.prompt_length,
        rollout.response_mask_BT.shape,
        rollout.tokens_BL.device,
    )
    # lines without tokens
    R, L = len(lines), max(1, *_widths(lines, prompts, responses))
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
