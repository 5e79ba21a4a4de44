"""Random batches, given to both sides, and the gradient of our loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from trl_bridge import MAX_TOKENS, VOCABULARY

from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.objective.objective import Objective
from lightning_mpo.scores import Denominators, TokenScores
from lightning_mpo.types import Experience, Rollout, take_rows

ALGORITHMS = Path(__file__).parents[2] / "configs" / "algorithm"


@cache
def algorithm(name: str) -> Objective:
    """Return the objective of `configs/algorithm/NAME.yaml`."""
    return Objective.from_file(ALGORITHMS / f"{name}.yaml", max_new_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Batch:
    """Responses over a table of logits, in float64. `mask_BT` may have gaps: tokens of a tool."""

    logits_BTV: Tensor
    tokens_BT: Tensor
    scored_BT: Tensor  # bool, right-padded
    mask_BT: Tensor  # bool, a part of `scored_BT`
    advantages_B: Tensor
    old_BT: Tensor | None  # None: the policy that sampled
    reference_BT: Tensor

    def logprobs(self) -> Tensor:
        """Return log-probs of the tokens. Shape `[B, T]`."""
        return self.logits_BTV.log_softmax(-1).gather(2, self.tokens_BT[..., None])[..., 0]

    def rows(self, index: Sequence[int]) -> Batch:
        """Return some of the rows."""
        values = {
            name: None if value is None else value[list(index)]
            for name, value in vars(self).items()
        }
        return Batch(**values)  # type: ignore[arg-type]

    def scores(self, logits_BTV: Tensor) -> TokenScores:
        """Return what a policy with these logits says of the tokens."""
        logprobs_BTV = logits_BTV.log_softmax(-1)
        chosen_BT = logprobs_BTV.gather(2, self.tokens_BT[..., None])[..., 0]
        entropy_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
        return TokenScores(*(torch.where(self.mask_BT, x, 0.0) for x in (chosen_BT, entropy_BT)))

    def inputs(self) -> dict[str, Tensor]:
        """Return the batch as TRL's trainers take it."""
        B = len(self.tokens_BT)
        inputs = {
            "prompt_ids": torch.ones(B, 1, dtype=torch.long),
            "prompt_mask": torch.ones(B, 1, dtype=torch.long),
            "completion_ids": self.tokens_BT,
            "completion_mask": self.scored_BT.long(),
            "tool_mask": self.mask_BT.long(),
            "advantages": self.advantages_B,
            "num_items_in_batch": self.mask_BT.sum(),
            "ref_per_token_logps": self.reference_BT,
        }
        old_BT = self.logprobs() if self.old_BT is None else self.old_BT
        inputs["old_logps"] = (old_BT * self.mask_BT).sum(1)  # RLOO's
        return inputs if self.old_BT is None else inputs | {"old_per_token_logps": self.old_BT}

    def experience(self) -> Experience:
        """Return the batch as our objectives take it."""
        B, T = self.tokens_BT.shape
        rollout = Rollout(
            tokens_BL=torch.cat([torch.ones(B, 1, dtype=torch.long), self.tokens_BT], 1),
            attention_mask_BL=torch.cat([torch.ones(B, 1, dtype=torch.bool), self.scored_BT], 1),
            response_mask_BT=self.mask_BT,
            group_B=torch.zeros(B, dtype=torch.long),
            behaviour_logprobs_BT=torch.zeros(B, T),
            finish_B=torch.zeros(B, dtype=torch.long),
        )
        return Experience(
            rollout=rollout,
            rewards_B=torch.zeros(B),
            valid_B=torch.ones(B, dtype=torch.bool),
            advantages_BT=self.advantages_B[:, None] * self.mask_BT,
            token_weights_BT=self.mask_BT.float(),
            old_logprobs_BT=self.old_BT,
            reference_logprobs_BT=self.reference_BT,
        )


def draw(
    seed: int, groups: int, group_size: int, *, spread: float = 0.3, gaps: bool = False
) -> Batch:
    """Draw a batch: ragged responses, group advantages, and old log-probs `spread` nats from the policy's.

    Args:
        seed: of everything.
        groups: prompts.
        group_size: responses per prompt.
        spread: standard deviation of the log-ratio of a token, in nats.
        gaps: leave some tokens inside of responses out.
    """
    g = torch.Generator().manual_seed(seed)
    B, T = groups * group_size, MAX_TOKENS - 2
    logits_BTV = torch.randn(B, T, VOCABULARY, generator=g, dtype=torch.float64)
    tokens_BT = torch.randint(0, VOCABULARY, (B, T), generator=g)
    scored_BT = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    holes_BT = torch.rand(B, T, generator=g) < 0.3
    holes_BT[:, 0] = False
    advantages_B = group_relative(torch.randn(B, generator=g, dtype=torch.float64), group_size)
    old_noise_BT, reference_noise_BT = (
        torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2)
    )
    mask_BT = scored_BT & ~holes_BT if gaps else scored_BT
    batch = Batch(logits_BTV, tokens_BT, scored_BT, mask_BT, advantages_B, None, torch.zeros(B, T))
    return replace(
        batch,
        old_BT=batch.logprobs() + spread * old_noise_BT,
        reference_BT=batch.logprobs() + 0.3 * reference_noise_BT,
    )


def ours(
    objective: Objective,
    batch: Batch,
    parts: Sequence[Sequence[int]] | None = None,
    denominators: Denominators | None = None,
) -> tuple[Tensor, Tensor]:
    """Return our loss and its gradient with respect to the logits, in one piece or in micro-batches."""
    logits_BTV, experience = batch.logits_BTV.clone().requires_grad_(), batch.experience()
    denominators = denominators or objective.denominators(experience)
    loss = torch.zeros((), dtype=torch.float64)
    for rows in parts or [range(len(batch.tokens_BT))]:
        scores = batch.rows(rows).scores(logits_BTV[list(rows)])
        loss = (
            loss
            + objective.loss(take_rows(experience, torch.tensor(list(rows))), scores, denominators)[
                0
            ]
        )
    return loss.detach(), torch.autograd.grad(loss, logits_BTV)[0]


def deviation(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return ((value - expected).norm() / expected.norm()).item()
