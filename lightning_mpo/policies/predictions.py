"""Predictions of trunk and heads at given tokens: most probable ids, and distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.mtp import MTPHeads
from lightning_mpo.policies.scoring import ResponseTokens, pick_hidden
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.types import Rollout


def heads_of(policy: CausalPolicy) -> MTPHeads:
    """Return the policy's multi-token heads.

    Raises:
        RuntimeError: it has none.
    """
    if policy.mtp is None:
        raise RuntimeError("the policy has no multi-token heads")
    return policy.mtp


def head_confidence(
    policy: CausalPolicy, rollout: Rollout, mask_BT: Tensor, offsets: int, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the confidence of each head, and whether its most probable id was sampled.

    The confidence is the probability of the most probable id. The distributions are those of the
    loss: over the support that was stored at t + n, or over the vocabulary with `support: full`.

    Args:
        policy: a policy with heads.
        rollout: rows.
        mask_BT: tokens that count.
        offsets: M, number of heads.
        temperature: divisor of the logits.

    Returns:
        Confidences, and hits as bool, each `[B, T, M]`; 0 and False where one of the tokens t … t + n
        does not count.

    Raises:
        RuntimeError: the policy has no heads.
    """
    heads = heads_of(policy)
    form: dict[str, Any] = {"temperature": temperature, **policy.head_form}
    confidences, hits = [], []
    with rollout_mode(policy):
        states = policy.trunk_states(rollout, future=True)
        tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
        for n, hidden_RLD in enumerate(heads.hidden(states, offsets), start=1):
            later = tokens.ahead(n, keep_support=heads.support == "stored")
            head = Unembedding.of(heads.unembedding(n), **form)
            ids_BT, logprobs_BT = later.most_probable(hidden_RLD, head)
            confidences.append(torch.where(later.mask_BT, logprobs_BT.exp(), 0))
            hits.append((ids_BT == later.ids_BT) & later.mask_BT)
    return torch.stack(confidences, -1), torch.stack(hits, -1)


@dataclass(frozen=True)
class ContinuationStates:
    """Hidden states of trunk and heads over sampled continuations of states."""

    policy: CausalPolicy
    continuations: Rollout
    temperature: float
    trunk_BTD: Tensor  # the trunk's, for token t of a continuation
    heads_BMD: Tensor  # the heads' at the state, for tokens 1 … M of a continuation

    @classmethod
    def of(
        cls, policy: CausalPolicy, continuations: Rollout, offsets: int, *, temperature: float
    ) -> ContinuationStates:
        """Run the policy over continuations, whose first token is o_t of the state.

        Raises:
            RuntimeError: the policy has no heads.
        """
        with rollout_mode(policy):
            states = policy.trunk_states(continuations, future=True)
            index_BT = states.lines.index_BT
            hidden_BMD = torch.stack(
                [
                    pick_hidden(hidden_RLD, index_BT[:, 0])
                    for hidden_RLD in heads_of(policy).hidden(states, offsets)
                ],
                1,
            )
            trunk_BTD = pick_hidden(states.after_norm_RLD, index_BT)
        return cls(policy, continuations, temperature, trunk_BTD, hidden_BMD)

    def policy_logprobs(self, n: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distribution that token n was sampled from, and its support.

        Args:
            n: the token of the continuation, from 0.
            rows: indices of continuations.

        Returns:
            Log-probs, `[n, V]`, -inf outside a stored support; and the support as bool `[n, V]`, or
            None for the full vocabulary. Barred ids are outside of both.
        """
        unembedding = self.policy.network.get_output_embeddings()
        logits_nV = self._logits(unembedding, self.trunk_BTD[rows, n])
        if self.continuations.support_BTK is None:
            barred_V = self.policy.head_form["barred_V"]
            inside_nV = None if barred_V is None else ~barred_V.expand_as(logits_nV)
            return logits_nV.log_softmax(-1), inside_nV
        ids_nK = self.continuations.support_BTK[rows, n].long()
        slots = self.continuations.support_mask_BTK
        slots_nK = torch.ones_like(ids_nK) if slots is None else slots[rows, n].long()
        inside_nV = torch.zeros_like(logits_nV).scatter_add_(1, ids_nK, slots_nK.to(logits_nV)) > 0
        return logits_nV.masked_fill(~inside_nV, -torch.inf).log_softmax(-1), inside_nV

    def head_logprobs(self, n: int, rows: Tensor, inside_nV: Tensor | None) -> Tensor:
        """Return the distribution of head n at the states, over some ids or over all of them.

        Args:
            n: the offset, from 1.
            rows: indices of continuations; heads read the state of each.
            inside_nV: ids of the distribution; None: all. Not read with `support: full` of the heads.

        Returns:
            Log-probs, `[n, V]`, -inf for other ids.
        """
        heads = heads_of(self.policy)
        logits_nV = self._logits(heads.unembedding(n), self.heads_BMD[rows, n - 1])
        if inside_nV is not None and heads.support == "stored":
            logits_nV = logits_nV.masked_fill(~inside_nV, -torch.inf)
        return logits_nV.log_softmax(-1)

    def _logits(self, unembedding: Any, hidden_nD: Tensor) -> Tensor:
        form: dict[str, Any] = {"temperature": self.temperature, **self.policy.head_form}
        head = Unembedding.of(unembedding, **form)
        logits_nV = head.form.logits(head.raw_logits(hidden_nD))
        if head.barred_V is None:
            return logits_nV
        return logits_nV.masked_fill(head.barred_V, -torch.inf)
