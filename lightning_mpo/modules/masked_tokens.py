"""The likelihood of demonstrations under a masked policy, for the supervised stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, within
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.functional import noise as F
from lightning_mpo.objective.likelihoods import behind_prompt
from lightning_mpo.policies.base import Policy
from lightning_mpo.types import PromptRow, Rollout


@dataclass(frozen=True)
class MaskedTokens:
    """Hides tokens of a demonstration at random; the policy learns to fill them in (LLaDA [C]).

        loss = Σ_{hidden} -log p(y_t | the tokens that are not hidden) / p / (rows · canvas)   nats

    Each row draws p uniformly from `least` to 1, and hides each of its tokens with probability p.
    The end tokens that fill the canvas are part of the answer, as a policy must learn where an
    answer ends. docs/algorithms.md 17.1.

    Args:
        canvas: response tokens of each row. Give `rollout.max_new_tokens` the same number later.
        least: smallest p; it bounds the weights 1/p [C].
        stratified: spread p evenly over the rows of a batch, which lowers the variance of the loss
            [I]; False draws it for each row by itself [C].
    """

    canvas: int
    least: float = 1e-3
    stratified: bool = True

    def __post_init__(self) -> None:
        at_least("likelihood", 1, canvas=self.canvas)
        within("likelihood", "(0, 1]", least=self.least)

    def numbers(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw the uniform numbers that choose hidden tokens.

        Args:
            rows: demonstrations of a batch.
            generator: source of all randomness, on the CPU.

        Returns:
            Shape ``[rows, 1 + canvas]``: a number for p, then one for each token.
        """
        numbers_BX = torch.rand(rows, 1 + self.canvas, generator=generator)
        if self.stratified:  # in a random order, as processes take rows side by side
            order_B = numbers_BX[:, 0].argsort()
            numbers_BX[:, 0] = F.stratified(torch.rand((), generator=generator), rows)[order_B]
        return numbers_BX

    def hide(self, solutions: Rollout, numbers_BX: Tensor) -> Rollout:
        """Attach one noised copy to each demonstration.

        Args:
            solutions: demonstrations on a canvas, on the CPU.
            numbers_BX: from `numbers`.
        """
        copies = F.independent_copies(
            numbers_BX[:, 1:], solutions.response_mask_BT, numbers_BX[:, 0], self.least
        )
        return replace(
            solutions,
            hidden_BCL=behind_prompt(solutions, copies.hidden_BCT),
            copy_weights_BCT=copies.weights_BCT,
        )


def check_likelihood(policy: Policy, likelihood: MaskedTokens | None) -> None:
    """Refuse a likelihood of another kind of policy.

    Args:
        policy: the policy that is trained.
        likelihood: of the stage.

    Raises:
        UserError: a masked policy has no likelihood, or a causal one has one.
    """
    name = type(policy).__name__
    if policy.masked and likelihood is None:
        raise UserError(
            f"`{name}` is a masked language model, and `SupervisedWarmup.likelihood` is not set: "
            "give `likelihood: {canvas: N}`, N the tokens of the longest response"
        )
    if likelihood is not None and not policy.masked:
        raise UserError(
            f"`SupervisedWarmup.likelihood` hides tokens of demonstrations, and `{name}` is a "
            "causal language model, which reads them from left to right: give `likelihood: null`, "
            "or a masked policy such as `MaskedPolicy`"
        )


def check_demonstrations(policy: Policy, rows: Sequence[PromptRow]) -> None:
    """Refuse demonstrations with a token that a masked policy gives probability 0.

    Args:
        policy: a masked policy.
        rows: with their solutions.

    Raises:
        UserError: a solution holds such a token; the message names the row and the token.
    """
    texts = policy.tokenizer.convert_ids_to_tokens(list(policy.barred))
    for row in rows:
        text = next((text for text in texts if text in (row.solution or "")), None)
        if text is not None:
            raise UserError(
                f"the solution of {describe(row)} holds {text!r}, which a masked policy never "
                "writes: leave it out"
            )
