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
        self,
        prompts: Sequence[Sequence[int]],
        betweens: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of texts behind a prompt and what stands between, all as token ids.

        Rows with one prompt share its forward pass.

        Args:
            prompts: ids in front of each row.
            betweens: ids between a prompt and its text; may be empty.
            texts: ids of each text.

        Returns:
            Log-probs in nats, 0 outside of texts, and the mask of the texts, each `[B, T]`.
        """
        rollout = continuation_rows(prompts, betweens, texts)
        scored_BU = self.score(to_device(rollout, self.device)).cpu()
        logprobs_BT = torch.zeros(len(texts), max(map(len, texts)))
        mask_BT = torch.zeros(logprobs_BT.shape, dtype=torch.bool)
        for b, (between, text) in enumerate(zip(betweens, texts, strict=True)):
            logprobs_BT[b, : len(text)] = scored_BU[b, len(between) : len(between) + len(text)]
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


def continuation_rows(
    prompts: Sequence[Sequence[int]],
    betweens: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
) -> Rollout:
    """Return rows whose responses are the tokens between and those of the text.

    Rows of one prompt are a group, so a policy that shares prompts computes it once.

    Args:
        prompts: ids in front of each row.
        betweens: ids between a prompt and its text.
        texts: ids of each text.
    """
    rests = [(*between, *text) for between, text in zip(betweens, texts, strict=True)]
    groups = {prompt: group for group, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    B = len(prompts)
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
        group_B=torch.tensor([groups[tuple(prompt)] for prompt in prompts]),
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.full((B,), int(Finish.STOP)),
    )
