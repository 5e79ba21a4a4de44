"""Action spaces whose ratios are products along a response (docs/algorithms.md 3.8)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional.traces import forward_trace, prefix_log_ratios
from lightning_mpo.objective.action_spaces import Actions, ActionSpace
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.selection import AllTokens, Selection


@dataclass(frozen=True)
class PrefixActions(ActionSpace):
    """Every token has the ratio of its prefix, and the gradient of its own log-prob (CTPO).

        R_t = sg(Π_{j<=t} r_j) · π(o_t) / sg(π(o_t))

    The product is the exact importance weight of a state and its token (arXiv:2605.07331
    [P, abstract; C, the authors' code]; docs/algorithms.md 3.8). Its spread grows with the position
    in the response, hence `PositionClip`.

    Args:
        mean: True takes the geometric mean of the prefix's ratios, which keeps their size and is
            biased: the second mode of the authors' code [C], and PNPO's ratio (arXiv:2608.01418
            [P, abstract]).
    """

    mean: bool = False

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return prefix_log_ratios(log_ratios, mask_BT, mean=self.mean)

    def check_with(self, axes: Axes) -> None:
        _need_all_tokens(self, axes)


@dataclass(frozen=True)
class ForwardTraceActions(ActionSpace):
    """Every token is an action whose loss is multiplied by the ratios of the next N - 1 tokens
    (NFPO).

        loss_t = sg(Π_{n=1}^{N-1} r_{t+n}) · f(r_t, A_t)          f: the surrogate

    Only the abstract of arXiv:2605.20865 is known to us: "augments the PPO surrogate objective
    using the cumulative likelihood ratio of the next N - 1 tokens" [P]. That the product carries no
    gradient, and that the trust region sees the token's ratio alone, are our choices [I];
    docs/algorithms.md 3.8. With the gradient in all N tokens, and the trust region on the product,
    it is `BlockActions` with `source: backbone` and `ratio: joint`.

    Args:
        steps: N, the current token included; 1 is the token-level method. 3 is ours [I], the
            paper's is not known [N].
    """

    token_level = True

    steps: int = 3

    def __post_init__(self) -> None:
        at_least("ForwardTraceActions", 1, steps=self.steps)

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return log_ratios, mask_BT, mask_BT.float()

    def actions(
        self,
        log_ratios: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        segments_BT: Tensor | None = None,
    ) -> Actions:
        actions = super().actions(log_ratios, advantages_BT, mask_BT, segments_BT)
        return replace(actions, factors_BU=forward_trace(log_ratios, mask_BT, steps=self.steps))

    def check_with(self, axes: Axes) -> None:
        _need_all_tokens(self, axes)


def _need_all_tokens(space: ActionSpace, axes: Axes) -> None:
    """Refuse selections, as tokens that are not chosen are not scored and have no ratio."""
    if not isinstance(axes[Selection], AllTokens):
        raise UserError(
            f"`{type(space).__name__}` multiplies the ratios of all tokens along a response; use "
            f"`selection: AllTokens`, not `{type(axes[Selection]).__name__}`"
        )
