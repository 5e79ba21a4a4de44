"""Rewards that read log-probs of the policy's frozen reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Reward
from lightning_mpo.types import Finish, Rollout, to_device


@dataclass(frozen=True)
class Reference:
    """The frozen reference of a policy: its state at the start of the run.

    Args:
        score: returns log-probs of the response tokens of a rollout, shape `[B, T]`, in nats.
        device: of its weights.
    """

    score: Callable[[Rollout], Tensor]
    device: torch.device

    def continuations(
        self, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of texts behind their contexts, all given as token ids.

        A context that begins another one is computed once for both.

        Args:
            contexts: ids in front of each text.
            texts: ids of each text.

        Returns:
            Log-probs in nats, 0 outside of texts, and the mask of the texts, each `[B, T]`.
        """
        rollout = continuation_rows(contexts, texts)
        scored_BU = self.score(to_device(rollout, self.device)).cpu()
        # of the scored tokens, which begin behind the shared context, keep those of the text
        stops = rollout.response_mask_BT.sum(1).tolist()
        logprobs_BT = torch.zeros(len(texts), max(map(len, texts)))
        mask_BT = torch.zeros(logprobs_BT.shape, dtype=torch.bool)
        for b, (text, stop) in enumerate(zip(texts, stops, strict=True)):
            logprobs_BT[b, : len(text)] = scored_BU[b, stop - len(text) : stop]
            mask_BT[b, : len(text)] = True
        return logprobs_BT, mask_BT


class ReferenceReward(Reward):
    """A reward that needs the policy's reference: `reference` is set before each `score`.

    The run keeps a reference for it: with LoRA the model without its adapters, else a frozen copy.
    Such a reward runs in the process of the run.
    """

    reference: Reference | None = None

    def connected(self) -> Reference:
        """Return the reference.

        Raises:
            UserError: there is no policy, as in `rewards-check`.
        """
        if self.reference is None:
            raise UserError(
                f"`{self.title}` reads log-probs of the policy's reference, and there is no policy "
                "here: use it with `fit`, `validate`, `test` or `predict -c`"
            )
        return self.reference


def continuation_rows(contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Rollout:
    """Return rows that end with the texts, in groups of one prompt.

    The prompt of a row is the shortest of the contexts that begins its context. The response is the
    rest of the context and the text. So a policy that shares prompts computes each of them once.

    Args:
        contexts: ids in front of each text.
        texts: ids of each text.
    """
    prompts = shortest_beginnings(contexts)
    groups = {prompt: group for group, prompt in enumerate(dict.fromkeys(prompts))}
    rests = [
        (*context[len(prompt) :], *text)
        for context, prompt, text in zip(contexts, prompts, texts, strict=True)
    ]
    B = len(contexts)
    S, T = max(map(len, prompts)), max(map(len, rests))
    tokens_BL = torch.zeros(B, S + T, dtype=torch.long)
    attention_mask_BL = torch.zeros(B, S + T, dtype=torch.bool)
    for b, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        first, stop = S - len(prompt), S + len(rest)
        tokens_BL[b, first:stop] = torch.tensor([*prompt, *rest])
        attention_mask_BL[b, first:stop] = True
    return Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=attention_mask_BL,
        response_mask_BT=attention_mask_BL[:, S:],
        group_B=torch.tensor([groups[prompt] for prompt in prompts]),
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.full((B,), int(Finish.STOP)),
    )


def shortest_beginnings(rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return for each row the shortest of the rows that begins it.

    >>> shortest_beginnings([[1, 2, 3], [4], [1, 2]])
    [(1, 2), (4,), (1, 2)]
    """
    distinct = sorted({tuple(row) for row in rows})  # a beginning comes before its rows
    shortest: dict[tuple[int, ...], tuple[int, ...]] = {}
    first: tuple[int, ...] | None = None
    for row in distinct:
        if first is None or row[: len(first)] != first:
            first = row
        shortest[row] = first
    return [shortest[tuple(row)] for row in rows]
