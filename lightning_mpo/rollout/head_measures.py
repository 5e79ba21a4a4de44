"""Measures of multi-token heads on rows of a rollout, before the first update (docs/algorithms.md 15.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.functional.actions import window
from lightning_mpo.functional.head_diagnostics import (
    calibration_sums,
    excess_entropy,
    gradient_parts,
)
from lightning_mpo.functional.heads import FULL_CHUNK_BYTES
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import Support
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.predictions import ContinuationStates, head_confidence, heads_of
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.sampling.replay import prompts_up_to
from lightning_mpo.scores import Denominators, TokenScores
from lightning_mpo.types import Experience, PromptRow, Rollout, take_rows, trim

Gradient = Sequence[Tensor | None]
"""The gradient of each trained weight of the trunk; None: no gradient."""


@dataclass(frozen=True)
class HeadMeasures:
    """Measures the heads of a policy.

    Args:
        scorer: gives temperature and precision.
        policy: the policy of the scorer.
        offsets: M, number of heads that the objective uses.
    """

    scorer: Scorer
    policy: CausalPolicy
    offsets: int

    # --- calibration ------------------------------------------------------------------------------

    def calibration(self, rollout: Rollout) -> Tensor:
        """Return `calibration_sums` of each head, `[M, BINS, 3]`, float64.

        Args:
            rollout: rows; the heads predict their response tokens.
        """
        rows_B = torch.arange(len(rollout.group_B), device=rollout.group_B.device)
        size = max(1, self.scorer.tokens // rollout.tokens_BL.shape[1])
        sums: list[Tensor] = []
        for rows in rows_B.split(size):
            part = take_rows(rollout, rows)
            with self.scorer.context():
                confidence_BTM, hit_BTM = head_confidence(
                    self.policy,
                    part,
                    part.response_mask_BT,
                    self.offsets,
                    temperature=self.scorer.temperature,
                )
            by_offset = [
                calibration_sums(
                    confidence_BTM[..., n - 1],
                    hit_BTM[..., n - 1],
                    window(part.response_mask_BT, n),
                )
                for n in range(1, self.offsets + 1)
            ]
            sums.append(torch.stack(by_offset))
        return torch.stack(sums).sum(0)

    # --- KL divergence from the policy ------------------------------------------------------------

    def excess(
        self,
        rollout: Rollout,
        support: Support,
        *,
        states: int,
        samples: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the sum of `excess_entropy` over states, and their number: `[M, 2]`, float64, nats.

        Continuations of states are sampled for this measure. Only those that reach t + n count, as a
        head has no target behind the end of a response.

        Args:
            rollout: rows; states are positions of their responses.
            support: support of the sampled continuations.
            states: number of states.
            samples: number of continuations of each state.
            generator: draws states and continuations, on the CPU.
        """
        sums = torch.zeros(self.offsets, 2, dtype=torch.float64, device=rollout.group_B.device)
        chosen_n2 = draw_states(rollout.response_mask_BT, self.offsets, states, generator)
        if not len(chosen_n2):
            return sums
        # states -> continuations -> hidden states
        part = take_rows(rollout, chosen_n2[:, 0])
        rows = (PromptRow("", ""),) * len(chosen_n2)
        request = SamplingRequest(support, self.scorer.temperature, self.offsets + 1)
        with rollout_mode(self.policy), self.scorer.context():
            continuations = LocalSampler().sample(
                self.policy,
                prompts_up_to(part, chosen_n2[:, 1], rows),
                samples,
                request,
                generator=generator,
            )
            hidden = ContinuationStates.of(
                self.policy, continuations, self.offsets, temperature=self.scorer.temperature
            )
            for n in range(1, min(self.offsets, continuations.response_mask_BT.shape[1] - 1) + 1):
                sums[n - 1] = self._excess_at(hidden, n, samples)
        return sums

    def _excess_at(self, hidden: ContinuationStates, n: int, samples: int) -> Tensor:
        """Return sum and number at one offset; states are split so that logits fit into memory."""
        mask_PJ = hidden.continuations.response_mask_BT[:, n].view(-1, samples)
        rows_PJ = torch.arange(mask_PJ.numel(), device=mask_PJ.device).view_as(mask_PJ)
        # a head that reads the tokens in between has one target for each continuation
        if heads_of(self.policy).reads_ahead:
            mask_PJ, rows_PJ = mask_PJ.reshape(-1, 1), rows_PJ.reshape(-1, 1)
        J = mask_PJ.shape[1]
        chosen = (mask_PJ.sum(1) >= min(2, J)).nonzero()[:, 0]
        size = max(1, FULL_CHUNK_BYTES // (4 * J * self.policy.vocabulary))
        total = torch.zeros(2, dtype=torch.float64, device=mask_PJ.device)
        for part in chosen.split(size):
            mask_BJ, rows_BJ = mask_PJ[part], rows_PJ[part]
            logprobs_nV, inside_nV = hidden.policy_logprobs(n, rows_BJ.flatten())
            # ids that some continuation may take
            inside_BV = None
            if inside_nV is not None:
                inside_BV = (inside_nV.view(*rows_BJ.shape, -1) & mask_BJ[..., None]).any(1)
            heads_BV = hidden.head_logprobs(n, rows_BJ[:, 0], inside_BV)
            logprobs_BJV = logprobs_nV.view(*rows_BJ.shape, -1).to(heads_BV)
            values_B = excess_entropy(logprobs_BJV, mask_BJ, heads_BV)
            total += torch.stack([values_B.double().sum(), values_B.new_tensor(len(part)).double()])
        return total

    # --- gradients --------------------------------------------------------------------------------

    def gradients(self, objective: Objective, experience: Experience, piece: int) -> Tensor:
        """Return `gradient_parts` of the surrogate, over the trained weights of the trunk.

        Three gradients of the trunk are in memory at once. No `.grad` is read or written.

        Args:
            objective: the algorithm; its loss terms are left out.
            experience: rows.
            piece: number of rows of one forward pass.

        Returns:
            `future` and `spurious`, `[2]`, float64; NaN if first tokens have no gradient.
        """
        weights = self.policy.parts().get("policy", [])
        denominators = objective.denominators(experience)
        sums: list[list[Tensor | None]] = [[None] * len(weights) for _ in range(3)]
        rows_B = torch.arange(len(experience.rewards_B), device=experience.rewards_B.device)
        for rows in rows_B.split(piece):
            part = trim(take_rows(experience, rows))
            if not bool(part.mask_BT.any()):
                continue
            request = replace(objective.request, future=self.offsets, upkeep=False, values=False)
            with torch.enable_grad(), self.scorer.context():
                scores = self.policy.score(
                    part.rollout,
                    part.mask_BT,
                    temperature=self.scorer.temperature,
                    request=request,
                )
            # d loss / d log-probs; with all advantages 1 it is that of the heads' cross-entropy
            first_BT, later_BTM = _of_logprobs(objective, part, scores, denominators)
            _, entropy_BTM = _of_logprobs(objective, _all_ones(part), scores, denominators)
            # d log-probs / d weights
            for total, output, of_output in (
                (sums[0], scores.logprobs_BT, first_BT),
                (sums[1], scores.future_BTM, later_BTM),
                (sums[2], scores.future_BTM, entropy_BTM),
            ):
                assert output is not None
                _accumulate(total, _of_weights(output, weights, of_output))
        return gradient_parts(*sums)


def draw_states(mask_BT: Tensor, offsets: int, states: int, generator: torch.Generator) -> Tensor:
    """Draw different states, and return their rows and positions t, `[n, 2]`, n at most `states`.

    The response must go on behind o_t. t + M must lie within the width T.

    Args:
        mask_BT: response tokens.
        offsets: M, number of heads.
        states: largest number of states.
        generator: a generator on the CPU.
    """
    known = window(mask_BT, 1).cpu()
    known[:, max(0, mask_BT.shape[1] - offsets) :] = False
    all_n2 = known.nonzero()
    order = torch.randperm(len(all_n2), generator=generator)[:states]
    return all_n2[order.sort().values].to(mask_BT.device)


def rows_with_credit(experience: Experience, most: int) -> Tensor:
    """Return the rows of the first groups that have an advantage other than 0.

    Groups stay complete. If the first of them has more than `most` rows, it is cut.

    Args:
        experience: all rows; those of a group are neighbours.
        most: largest number of rows.
    """
    credit_BT = experience.advantages_BT != 0
    if experience.future_advantages_BT is not None:
        credit_BT = credit_BT | (experience.future_advantages_BT != 0)
    learnt_B = (credit_BT & experience.mask_BT).any(1)
    group_B = experience.rollout.group_B
    rows = torch.isin(group_B, group_B[learnt_B]).nonzero()[:, 0][:most]
    # drop the last group if it is not complete, unless it is the only one
    if len(rows) and len(rows) < len(group_B):
        last = group_B[rows[-1]]
        if bool((group_B[rows] == last).sum() < (group_B == last).sum()):
            others = rows[group_B[rows] != last]
            rows = others if len(others) else rows
    return rows


def _all_ones(experience: Experience) -> Experience:
    """Return the rows with the advantage 1 at all tokens."""
    ones_BT = torch.ones_like(experience.advantages_BT)
    future = experience.future_advantages_BT
    return replace(
        experience,
        advantages_BT=ones_BT,
        future_advantages_BT=None if future is None else ones_BT,
    )


def _of_logprobs(
    objective: Objective, part: Experience, scores: TokenScores, denominators: Denominators
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the surrogate with respect to log-probs of policy and heads."""
    assert scores.future_BTM is not None
    leaves = [value.detach().requires_grad_() for value in (scores.logprobs_BT, scores.future_BTM)]
    with torch.enable_grad():
        loss, _ = objective.surrogate_loss(
            part, replace(scores, logprobs_BT=leaves[0], future_BTM=leaves[1]), denominators
        )
        first_BT, later_BTM = torch.autograd.grad(loss, leaves)
    return first_BT, later_BTM


def _of_weights(output: Tensor, weights: Sequence[Tensor], of_output: Tensor) -> Gradient:
    """Return the gradients of weights, given that of `output`; None: `output` does not use them."""
    if not output.requires_grad or not weights:
        return [None] * len(weights)
    return torch.autograd.grad(
        [output], list(weights), [of_output], retain_graph=True, allow_unused=True
    )


def _accumulate(total: list[Tensor | None], gradient: Gradient) -> None:
    """Add a gradient to the sums, in place."""
    for i, value in enumerate(gradient):
        if value is not None:
            before = total[i]
            total[i] = value if before is None else before.add_(value)
