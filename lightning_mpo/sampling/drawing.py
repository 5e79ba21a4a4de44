"""The step from logits to one token of each row, with the distribution that it is drawn from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.supports import candidates as most_probable
from lightning_mpo.objective.supports import Support


@dataclass(frozen=True)
class Drawn:
    """Tokens of one step, and the distributions that they were drawn from; log-probs in nats."""

    tokens_B: Tensor
    logprobs_B: Tensor
    kept_mass_B: Tensor
    support_BK: Tensor | None = None
    support_mask_BK: Tensor | None = None
    candidates_BK: Tensor | None = None
    candidate_logprobs_BK: Tensor | None = None
    entropy_B: Tensor | None = None  # nats


@dataclass(frozen=True)
class Step:
    """The step from logits to a token, its log-prob and its support.

    Args:
        support: ids that may be drawn.
        temperature: divisor of the logits.
        greedy: whether to take the most probable id.
        candidates: number of most probable ids to record.
        entropy: whether to record the entropy of the distribution.
    """

    support: Support
    temperature: float
    greedy: bool
    candidates: int = 0
    entropy: bool = False

    def draw(
        self, logits_BV: Tensor, ranking_BV: Tensor, uniform_B: Tensor, step: int = 0
    ) -> Drawn:
        """Draw a token of each row.

        Args:
            logits_BV: of the policy.
            ranking_BV: logits that rank the ids of the support: the same tensor, or the
                reference's.
            uniform_B: numbers in [0, 1), one for each row.
            step: position of the tokens in their responses, for supports that depend on it.
        """
        # the support, of the policy's or the reference's probabilities
        same = ranking_BV is logits_BV
        logits_BV = logits_BV / self.temperature if self.temperature != 1.0 else logits_BV
        support_BK, support_mask_BK = self.support.at(step).select(
            logits_BV if same else ranking_BV / self.temperature
        )
        # one id of it
        total_B = logits_BV.logsumexp(-1)
        if support_BK is None:
            choices_BK = logits_BV
        else:
            choices_BK = logits_BV.gather(1, support_BK.long())
            if support_mask_BK is not None:
                choices_BK = choices_BK.masked_fill(~support_mask_BK, -torch.inf)
        support_total_B = total_B if support_BK is None else choices_BK.logsumexp(-1)
        slot_B = (
            choices_BK.argmax(-1)
            if self.greedy
            else inverse_cdf(choices_BK, support_total_B, uniform_B)
        )
        logprobs_B = choices_BK.gather(1, slot_B[:, None])[:, 0] - support_total_B
        tokens_B = (
            slot_B if support_BK is None else support_BK.gather(1, slot_B[:, None])[:, 0].long()
        )
        # its record, and the most probable ids
        if self.support.by_step:
            support_BK, support_mask_BK = in_slots(
                support_BK, support_mask_BK, self.support.slots or 0, tokens_B
            )
        drawn = Drawn(
            tokens_B,
            logprobs_B,
            (support_total_B - total_B).exp(),
            None if support_BK is None else support_BK.int(),
            support_mask_BK,
            entropy_B=_entropy(choices_BK - support_total_B[:, None]) if self.entropy else None,
        )
        if not self.candidates:
            return drawn
        ids_BK, candidate_logits_BK = most_probable(
            choices_BK, slot_B, self.candidates, drawn.support_BK
        )
        return replace(
            drawn,
            candidates_BK=ids_BK,
            candidate_logprobs_BK=(candidate_logits_BK - support_total_B[:, None]).float(),
        )


def in_slots(
    support_BK: Tensor | None, support_mask_BK: Tensor | None, slots: int, tokens_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a support in a number of slots; all are empty for the whole vocabulary.

    Args:
        support_BK: ids; None: the whole vocabulary.
        support_mask_BK: the slots that count; None: all.
        slots: number of slots.
        tokens_B: the drawn tokens, for the number of rows.
    """
    ids_BS = torch.zeros(len(tokens_B), slots, dtype=torch.int32, device=tokens_B.device)
    mask_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    if support_BK is not None:
        K = support_BK.shape[1]
        ids_BS[:, :K] = support_BK
        mask_BS[:, :K] = True if support_mask_BK is None else support_mask_BK
    return ids_BS, mask_BS


def _entropy(logprobs_BK: Tensor) -> Tensor:
    """Return the entropy of each row in nats; an id of probability 0 adds nothing."""
    terms_BK = logprobs_BK.exp() * logprobs_BK
    return -terms_BK.masked_fill(logprobs_BK == -torch.inf, 0).sum(-1)


def inverse_cdf(logits_BK: Tensor, total_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw an index per row: the first whose cumulative probability exceeds the uniform number.

    Args:
        logits_BK: -inf where nothing can be drawn.
        total_B: their logsumexp.
        uniform_B: numbers in [0, 1).

    Example:
        >>> logits = torch.tensor([0.25, 0.75]).log().expand(2, -1)
        >>> inverse_cdf(logits, logits.logsumexp(-1), torch.tensor([0.2, 0.3]))
        tensor([0, 1])
    """
    cumulative_BK = (logits_BK - total_B[:, None]).exp().cumsum(-1)
    last_B = cumulative_BK[:, -1]
    target_B = torch.minimum(uniform_B * last_B, last_B * (1 - 1e-6))
    return torch.searchsorted(cumulative_BK, target_B[:, None], right=True)[:, 0].clamp(
        max=logits_BK.shape[1] - 1
    )


def check_probabilities(numbers: list[Tensor]) -> None:
    """Refuse a policy that gives no probabilities.

    Args:
        numbers: log-probs, or sums of logits.

    Raises:
        UserError: one of them is nan or infinite.
    """
    if not all(bool(part.isfinite().all()) for part in numbers):
        raise UserError(
            "the policy gives no probabilities, only nan: its weights are nan or infinite, or "
            "too large for the precision of the run; take another checkpoint or model"
        )
