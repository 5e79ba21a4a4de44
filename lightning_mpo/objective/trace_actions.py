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
    """Each token has the ratio of its prefix, and the gradient of its own log-prob (CTPO).

        R_t = sg(Π_{j<=t} r_j) · π(o_t) / sg(π(o_t))

    The product is the exact importance weight of a state and its token (arXiv:2605.07331
    [P, abstract; C, the authors' code]; docs/algorithms.md 3.8). Its spread grows with the position
    in the response. `PositionClip` has a range that grows in the same way.

    Args:
        mean: True takes the geometric mean of the prefix's ratios, which is biased. Its size does not
            grow with the position. It is the second mode of the authors' code [C], and the ratio of
            PNPO (arXiv:2608.01418 [P, abstract]).
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
    """Each token is an action. The ratios of the next N - 1 tokens multiply its loss (NFPO).

        loss_t = sg(Π_{n=1}^{N-1} r_{t+n}) · f(r_t, A_t)          f: the surrogate

    We read the abstract of arXiv:2605.20865 alone: "augments the PPO surrogate objective using the
    cumulative likelihood ratio of the next N - 1 tokens" [P]. Two choices are ours [I]: the product
    carries no gradient, and the clip sees the token's ratio alone (docs/algorithms.md 3.8). With
    gradient and clip on the product of all N tokens, it is `BlockActions` with `source: backbone`
    and `ratio: joint`.

    Args:
        steps: N, number of tokens, the current one included; 1 is the token-level method. The value
            3 is ours [I]; that of the paper is not known [N].

    Raises:
        UserError: `steps` is below 1.
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
