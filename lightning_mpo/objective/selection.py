"""Axis "selection": which tokens carry gradient (docs/algorithms.md 6)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, one_of, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import selections as F
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.supports import Support


class Selection(Member):
    """Chooses tokens once per rollout. Tokens that are not chosen are not scored: neither head nor
    loss sees them.
    """

    needs_entropy = False
    """True if the choice depends on entropies at rollout weights."""

    @property
    def weighted(self) -> bool:
        """Whether chosen tokens weigh other than 1, which has no meaning over actions of several
        tokens.
        """
        return False

    @property
    def averages_over_all_tokens(self) -> bool:
        """Whether means are taken over all tokens of the response, chosen or not."""
        return False

    def check_with(self, axes: Axes) -> None:
        actions, support = axes[ActionSpace], axes[Support]
        if self.weighted and not actions.token_level:
            raise UserError(
                f"`{type(self).__name__}` weighs single tokens, which has no meaning over "
                f"`{type(actions).__name__}`; "
                "use `actions: TokenActions`"
            )
        if self.averages_over_all_tokens and support.outside == "drop":
            raise UserError(
                f"`{type(self).__name__}` takes means over whole responses, of which "
                f"`{type(support).__name__}.outside: drop` takes tokens away; use `unite`"
                + (", or `unbiased: false`" if self.weighted else "")
            )

    @abstractmethod
    def choose(
        self, mask_BT: Tensor, generator: torch.Generator, entropy_BT: Tensor | None = None
    ) -> Tensor:
        """Return `token_weights_BT`, float, 0 where a token is not scored.

        Args:
            mask_BT: response tokens.
            generator: on the CPU, of this choice alone: it is not that of the sampling.
            entropy_BT: of the policy at rollout weights, nats, where `needs_entropy`.
        """


@dataclass(frozen=True)
class AllTokens(Selection):
    """Every response token, at weight 1."""

    def choose(
        self, mask_BT: Tensor, generator: torch.Generator, entropy_BT: Tensor | None = None
    ) -> Tensor:
        return mask_BT.float()


@dataclass(frozen=True)
class SampledTokens(Selection):
    """The first tokens of each response, and some of those behind them by chance (S-GRPO).

        t in T_i  <=>  t < prefix, or u_t < probability and fewer than cap tokens are chosen so far
                                                  (arXiv:2504.20834 [S]; docs/algorithms.md 6.1)

    The scan from the left is what the formula says: a binding cap leaves the end of long responses
    out [I]. No number of the paper was found; the defaults are ours [I].

    Args:
        prefix: alpha, tokens at the start that are always chosen.
        cap: k, most tokens of a response; None: no cap.
        probability: P, of every later token, in (0, 1].
        cap_mode: "scan" stops at the cap from the left; "uniform" thins all that were drawn evenly
            down to it, as a re-implementation does [C].
        unbiased: weigh later tokens by 1 / P and take means over the whole response
            (Horvitz-Thompson), so that the expected loss is that of all tokens; needs `cap: null`.
    """

    prefix: int = 50
    cap: int | None = 100
    probability: float = 0.4
    cap_mode: Literal["scan", "uniform"] = "scan"
    unbiased: bool = False

    def __post_init__(self) -> None:
        at_least("SampledTokens", 0, prefix=self.prefix)
        at_least("SampledTokens", 1, cap=self.cap)
        if self.cap is not None and self.cap < max(self.prefix, 1):
            raise UserError(
                f"`SampledTokens.cap` must be at least 1 and not below `prefix` ({self.prefix}), "
                f"got {self.cap}"
            )
        within("SampledTokens", "(0, 1]", probability=self.probability)
        one_of("SampledTokens", ("scan", "uniform"), cap_mode=self.cap_mode)
        if self.unbiased and self.cap is not None:
            raise UserError(
                "`SampledTokens.unbiased` needs `cap: null`: with a cap the probability of a token "
                "is not known"
            )

    @property
    def weighted(self) -> bool:
        """Whether later tokens weigh more."""
        return self.unbiased

    @property
    def averages_over_all_tokens(self) -> bool:
        """Whether means are over whole responses."""
        return self.unbiased

    def choose(
        self, mask_BT: Tensor, generator: torch.Generator, entropy_BT: Tensor | None = None
    ) -> Tensor:
        uniform_BT = torch.rand(mask_BT.shape, generator=generator).to(mask_BT.device)
        chosen_BT = F.sampled_tokens(
            mask_BT,
            uniform_BT,
            prefix=self.prefix,
            cap=self.cap,
            probability=self.probability,
            uniform_cap=self.cap_mode == "uniform",
        )
        weights_BT = chosen_BT.float()
        if self.unbiased:
            weights_BT = weights_BT.masked_fill(
                chosen_BT & ~F.first_tokens(mask_BT, self.prefix), 1 / self.probability
            )
        return weights_BT


@dataclass(frozen=True)
class HighEntropyTokens(Selection):
    """The tokens of each response at which the policy was least certain.

    Top fifth by entropy at rollout weights ("Beyond the 80/20 Rule", arXiv:2506.01939 [REC];
    docs/algorithms.md 6.2); TRL's `top_entropy_quantile` takes the quantile over a batch [C]. Here
    it is that of one response, so that the choice is the same on one process and on eight [I].
    Means are over whole responses, as in TRL [C] and the paper [REC]: the other tokens count with a
    loss of 0. A KL penalty, which TRL puts on all tokens, is on the chosen ones here.

    Args:
        share: of the tokens of a response, in (0, 1]; at least one token is chosen.
    """

    needs_entropy = True
    averages_over_all_tokens = True

    share: float = 0.2

    def __post_init__(self) -> None:
        within("HighEntropyTokens", "(0, 1]", share=self.share)

    def choose(
        self, mask_BT: Tensor, generator: torch.Generator, entropy_BT: Tensor | None = None
    ) -> Tensor:
        if entropy_BT is None:
            raise RuntimeError("`HighEntropyTokens` needs the entropies at rollout weights")
        return F.highest(entropy_BT, mask_BT, share=self.share).float()
