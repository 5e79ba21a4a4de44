"""Axis "likelihood": how the log-prob of a response is computed (docs/algorithms.md 17).

None stands for the chain rule of a causal model. The members here are for masked language models,
which reveal the tokens of a response in any order. A member hides tokens in copies of a row and
weighs the log-probs of the hidden ones; `functional/noise.py` has the equations.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, one_of
from lightning_mpo.errors import UserError
from lightning_mpo.functional import noise as F
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.masked_rules import check_masked
from lightning_mpo.objective.reductions import ConstantLength, Reduction
from lightning_mpo.types import Rollout

MOST_COPIES = 1_000
"""Pairs, samples or steps of a response in one pass over a rollout. Each is a pass of the model."""


class Noise(NamedTuple):
    """Noised copies of rows; a response has `Likelihood.repeats` rows, side by side."""

    hidden_BCL: Tensor  # bool
    weights_BCT: Tensor  # float32
    importance_B: Tensor | None = None  # factors of the losses of rows; None: 1


class Likelihood(Member):
    """Estimates the log-prob of a response from noised copies of its row."""

    token_level = False
    """True if each scored token has a log-prob of its own; False if only a response's sum has a
    meaning.
    """
    needs_steps = False
    """True if copies repeat the steps of the sampler, which stores them."""

    @property
    def weighs_rows(self) -> bool:
        """Whether the losses of rows have importance weights."""
        return False

    @property
    def repeats(self) -> int:
        """Rows of a response in one pass over a rollout, each with noise of its own."""
        return 1

    @property
    def copies(self) -> int:
        """C, noised copies that one row holds."""
        return 1

    def scored(self, rollout: Rollout) -> Tensor:
        """Return the tokens of the canvas that are part of the response, bool `[B, T]`."""
        return rollout.attention_mask_BL[:, rollout.prompt_length :]

    @abstractmethod
    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        """Draw the noise of one pass over a rollout.

        Args:
            rollout: B responses; the noise has B · `repeats` rows.
            generator: source of all randomness, on the CPU.

        Raises:
            UserError: the rollout lacks tensors that the likelihood needs.
        """

    def check_with(self, axes: Axes) -> None:
        """Refuse members that need the chain rule, or log-probs of single tokens."""
        check_masked(type(self).__name__, axes, tokens=self.token_level, steps=self.needs_steps)


@dataclass(frozen=True)
class CoupledElbo(Likelihood):
    """The ELBO from pairs of copies: one hides a random subset, one the other tokens (ESPO).

        E = ½ [(L+1)/x · Σ_{t in m} log p(y_t | m hidden) + (L+1)/(L-x) · Σ_{t not in m} …]

    The size x of the subset m is uniform on 0 … L, and a pair scores each token once.
    docs/algorithms.md 17.2; arXiv:2512.03759 [C].

    Args:
        pairs: pairs of copies whose mean is taken; the paper's `num_mc`.
        padding: whether the end tokens that fill the canvas are part of the response [C].
    """

    pairs: int = 1
    padding: bool = True

    def __post_init__(self) -> None:
        at_least("CoupledElbo", 1, most=MOST_COPIES, pairs=self.pairs)

    @property
    def copies(self) -> int:
        return 2 * self.pairs

    def scored(self, rollout: Rollout) -> Tensor:
        return super().scored(rollout) if self.padding else rollout.response_mask_BT

    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        mask_BT = self.scored(rollout).cpu()
        B, T = mask_BT.shape
        parts = []
        for _ in range(self.pairs):
            # sizes that are spread evenly over the rows of a rollout
            uniform_B = F.stratified(torch.rand((), generator=generator), B)
            size_B = F.whole_numbers(uniform_B, 0, mask_BT.sum(1))
            uniform_BT = torch.rand(B, T, generator=generator)
            parts.append(F.coupled_copies(uniform_BT, mask_BT, size_B, self.pairs))
        hidden_BCT = torch.cat([part.hidden_BCT for part in parts], 1)
        weights_BCT = torch.cat([part.weights_BCT for part in parts], 1)
        return Noise(behind_prompt(rollout, hidden_BCT), weights_BCT)


@dataclass(frozen=True)
class Elbo(Likelihood):
    """The ELBO from copies that hide a random subset, each in a row of its own (BGPO).

        ell = L/l · Σ_{t in m} log p(y_t | m hidden),   l uniform on 1 … L,   |m| = l

    Micro-batches cut the rows, so memory does not grow with their number. docs/algorithms.md 17.3;
    arXiv:2510.11683 [P].

    Args:
        samples: n, copies of a response in one pass over a rollout.
        padding: whether the end tokens that fill the canvas are part of the response.
        stratified: spread the sizes l of a response evenly, which lowers the variance [C, another
            implementation]; False draws them independently [P].
    """

    samples: int = 16
    padding: bool = True
    stratified: bool = True

    def __post_init__(self) -> None:
        at_least("Elbo", 1, most=MOST_COPIES, samples=self.samples)

    @property
    def repeats(self) -> int:
        return self.samples

    def scored(self, rollout: Rollout) -> Tensor:
        return super().scored(rollout) if self.padding else rollout.response_mask_BT

    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        mask_BT = self.scored(rollout).cpu()
        (B, T), n = mask_BT.shape, self.samples
        if self.stratified:
            uniform_BN = F.stratified(torch.rand(B, generator=generator), n)
        else:
            uniform_BN = torch.rand(B, n, generator=generator)
        mask_BT = mask_BT.repeat_interleave(n, 0)
        size_B = F.whole_numbers(uniform_BN.flatten(), 1, mask_BT.sum(1).clamp(min=1))
        copies = F.subset_copies(torch.rand(B * n, T, generator=generator), mask_BT, size_B)
        return Noise(behind_prompt(rollout, copies.hidden_BCT, n), copies.weights_BCT)


@dataclass(frozen=True)
class Denoising(Likelihood):
    """Steps of the sampler, each replayed in a row of its own (AGRPO).

        hidden at step s = tokens revealed at s or later,   scored = tokens revealed at s

    The state is the partly revealed row, and each token of the step has a log-prob. Steps are drawn
    up to the last one that revealed a token of the response. The order in which positions are
    revealed is part of the environment, and no part of the ratio. docs/algorithms.md 17.4;
    arXiv:2510.04019 [C].

    Args:
        steps: n, steps of a response in one pass over a rollout.
        stratified: draw one step from each of n equal parts of the steps of a response.
        importance: "uniform" draws each step with the same probability. "entropy" draws steps in
            proportion to their entropy, and divides losses by that probability [C]. It lowers the
            variance only if losses follow the entropy [I].
    """

    token_level = True
    needs_steps = True

    steps: int = 8
    stratified: bool = True
    importance: Literal["uniform", "entropy"] = "uniform"

    def __post_init__(self) -> None:
        at_least("Denoising", 1, most=MOST_COPIES, steps=self.steps)
        one_of("Denoising", ("uniform", "entropy"), importance=self.importance)

    @property
    def weighs_rows(self) -> bool:
        return self.importance == "entropy"

    @property
    def repeats(self) -> int:
        return self.steps

    def check_with(self, axes: Axes) -> None:
        super().check_with(axes)
        reduction, actions = axes[Reduction], axes[ActionSpace]
        if self.weighs_rows and not actions.token_level:
            raise UserError(
                f"`Denoising.importance: entropy` weighs tokens, and `{type(actions).__name__}` "
                "takes one ratio for all tokens of a step; use `actions: TokenActions`, or "
                "`importance: uniform`"
            )
        if self.importance == "entropy" and not isinstance(reduction, ConstantLength):
            raise UserError(
                "`Denoising.importance: entropy` weighs losses of steps, which "
                f"`{type(reduction).__name__}` would divide away; use `reduction: ConstantLength`"
            )

    def draw(self, rollout: Rollout, generator: torch.Generator) -> Noise:
        reveal_BT, response_BT = rollout.reveal_BT, rollout.response_mask_BT.cpu()
        if reveal_BT is None or rollout.reveal_entropy_BT is None:
            raise UserError(
                "`Denoising` replays the steps of a sampler, which this one does not record; use "
                "`rollout.sampler: DiffusionSampler`"
            )
        reveal_BT, n = reveal_BT.cpu().long(), self.steps
        # uniform numbers: one for each step to draw
        shape = len(reveal_BT), n
        uniform_BN = torch.rand(shape, generator=generator)
        if self.stratified:
            order_BN = torch.rand(shape, generator=generator).argsort(0)
            uniform_BN = F.low_discrepancy(order_BN, uniform_BN)
        # the steps, up to the last one that revealed a token of the response
        last_B = reveal_BT.masked_fill(~response_BT, 0).amax(1)
        importance_B = None
        if self.importance == "uniform":
            step_BN = F.whole_numbers(uniform_BN, 0, last_B[:, None])
        else:
            count = int(last_B.max()) + 1
            entropy_BT = rollout.reveal_entropy_BT.cpu()
            probabilities_BS = F.step_probabilities(
                entropy_BT, reveal_BT.clamp(max=count), last_B, count
            )
            step_BN = F.draw_steps(uniform_BN, probabilities_BS)
            drawn_BN = probabilities_BS.gather(1, step_BN)
            importance_B = (1 / ((last_B[:, None] + 1) * drawn_BN)).flatten()
        copies = F.replayed_copies(reveal_BT.repeat_interleave(n, 0), step_BN.view(-1, 1))
        hidden_BCL = behind_prompt(rollout, copies.hidden_BCT, n)
        return Noise(hidden_BCL, copies.weights_BCT, importance_B)


def behind_prompt(rollout: Rollout, hidden_BCT: Tensor, repeats: int = 1) -> Tensor:
    """Put columns of the prompt, none of them hidden, in front of a mask of responses.

    Args:
        rollout: B responses.
        hidden_BCT: of B · `repeats` rows, on the CPU.
        repeats: rows of a response.

    Returns:
        Shape ``[B · repeats, C, L]``.

    Raises:
        ValueError: the numbers of rows do not fit.
    """
    B, C, _ = hidden_BCT.shape
    if len(rollout.group_B) * repeats != B:
        raise ValueError("each response must have as many rows as it is repeated")
    prompt_BCS = torch.zeros(B, C, rollout.prompt_length, dtype=torch.bool)
    return torch.cat([prompt_BCS, hidden_BCT], 2)
