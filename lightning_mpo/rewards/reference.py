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

        Args:
            contexts: ids in front of each text.
            texts: ids of each text.

        Returns:
            Log-probs in nats, 0 outside of texts, and the mask of the texts, each `[B, T]`.
        """
        rollout = continuation_rows(contexts, texts)
        logprobs_BT = self.score(to_device(rollout, self.device))
        return logprobs_BT.cpu(), rollout.response_mask_BT


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
    """Return texts as responses to their contexts, each row a group of its own."""
    B = len(contexts)
    S, T = max(map(len, contexts)), max(map(len, texts))
    tokens_BL = torch.zeros(B, S + T, dtype=torch.long)
    attention_mask_BL = torch.zeros(B, S + T, dtype=torch.bool)
    for b, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        first, stop = S - len(context), S + len(text)
        tokens_BL[b, first:stop] = torch.tensor([*context, *text])
        attention_mask_BL[b, first:stop] = True
    return Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=attention_mask_BL,
        response_mask_BT=attention_mask_BL[:, S:],
        group_B=torch.arange(B),
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.full((B,), int(Finish.STOP)),
    )
