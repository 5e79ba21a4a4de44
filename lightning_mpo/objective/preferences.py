"""Direct preference optimisation: an advantage that makes pairs, and the loss over pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_mpo.checks import one_of, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional import preferences as F
from lightning_mpo.objective.action_spaces import Actions, ActionSpace, SequenceActions
from lightning_mpo.objective.advantages import Advantage
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.corrections import Correction
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.objective.outcome import Estimate, Outcome
from lightning_mpo.objective.reductions import Reduction, SequenceMean
from lightning_mpo.objective.selection import AllTokens, Selection
from lightning_mpo.objective.surrogates import Surrogate
from lightning_mpo.scores import Metrics


@dataclass(frozen=True)
class Preferences(Advantage):
    """Pairs of a prompt that a response wins, minus pairs that it loses.

        A_i = #{j : (i, j) is a pair} - #{j : (j, i) is a pair}         docs/algorithms.md 4.10 [I]

    Responses in no pair carry no loss and are in no denominator. So a prompt whose rewards are all
    equal counts nowhere. At the reference, `PairwiseLogistic` has the gradient of `PolicyGradient`
    with these advantages, times β/2 for "extremes".

    Args:
        pairs: "extremes", the highest reward against the lowest; or "all", each reward against each
            lower one.
    """

    compares_group = True

    pairs: Literal["extremes", "all"] = "extremes"

    def __post_init__(self) -> None:
        one_of("Preferences", ("extremes", "all"), pairs=self.pairs)

    def estimate(self, outcome: Outcome) -> Estimate:
        advantages_B, paired_B = F.preferences(
            outcome.rewards_B, outcome.group_size, pairs=self.pairs, valid_B=outcome.valid_B
        )
        weights_BT = outcome.spread(paired_B.to(advantages_B))
        return Estimate(outcome.spread(advantages_B), weights_BT=weights_BT)


@dataclass(frozen=True)
class PairwiseLogistic(Surrogate):
    """`-log σ(β (d_w - d_l))` over pairs of a better and a worse response to a prompt (DPO).

        d = log π(y) - log π_ref(y), summed over the tokens of the response

    arXiv:2305.18290 [REC; C, TRL]; docs/algorithms.md 5.9. The denominator of a ratio is the
    reference, not the policy that sampled. Updates need no correction for that policy. The pairs are
    those of `Preferences`; with another advantage of a group, all pairs whose advantages differ.
    Micro-batches hold whole groups.

    Args:
        beta: β, positive, per nat. A small β lets the policy go far from the reference.
    """

    at_reference = True
    compares_group = True

    beta: float = 0.1

    def __post_init__(self) -> None:
        positive("PairwiseLogistic", beta=self.beta)

    def check_with(self, axes: Axes) -> None:
        super().check_with(axes)
        name, actions, advantage = type(self).__name__, axes[ActionSpace], axes[Advantage]
        if not isinstance(actions, SequenceActions) or actions.mean:
            raise UserError(
                f"`{name}` compares log-probs of whole responses; use `actions: {{class_path: "
                "SequenceActions, init_args: {mean: false, form: sequence}}`"
            )
        if not advantage.compares_group:
            raise UserError(
                f"`{name}` compares the completions of a prompt, and "
                f"`{type(advantage).__name__}` does not; use `advantage: Preferences`"
            )
        for axis, member in ((Selection, AllTokens), (Reduction, SequenceMean)):
            if not isinstance(axes[axis], member):
                raise UserError(
                    f"`{name}` takes the mean over pairs of whole responses; use "
                    f"`{axis.__name__.lower()}: {member.__name__}`, not "
                    f"`{type(axes[axis]).__name__}`"
                )
        for other in (*axes.all(Correction), *axes.all(Likelihood)):
            raise UserError(
                f"`{name}` takes log-probs of a causal policy against its reference, without "
                f"`{type(other).__name__}`; leave it out"
            )

    def loss(self, actions: Actions) -> Tensor:
        log_ratios_B, advantages_B, group_B, mask_B = self._rows(actions)
        losses_B = F.pairwise_logistic(
            log_ratios_B, advantages_B, group_B, beta=self.beta, mask_B=mask_B
        )
        return losses_B[:, None] * actions.mask_BU

    def measure(self, actions: Actions) -> Metrics:
        """Return mean margin and the share of positive ones, over pairs."""
        log_ratios_B, advantages_B, group_B, mask_B = self._rows(actions)
        margins_BB, pairs_BB = F.pair_margins(
            log_ratios_B.detach(), advantages_B, group_B, beta=self.beta, mask_B=mask_B
        )
        count = pairs_BB.sum().float()
        return {
            "pairs/margin": ((margins_BB * pairs_BB).sum(), count),
            "pairs/accuracy": (((margins_BB > 0) & pairs_BB).sum().float(), count),
        }

    def _rows(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-ratio, advantage, group and mask of each row; a row has one action."""
        if actions.group is None:
            raise RuntimeError("`PairwiseLogistic` needs the log-probs of the reference")
        mask_BU = actions.mask_BU
        log_ratios_B = (actions.group.reference_log_ratios_BU * mask_BU).sum(1)
        advantages_B = (actions.advantages_BU * mask_BU).sum(1)
        return log_ratios_B, advantages_B, actions.group.group_B, mask_BU.any(1)
