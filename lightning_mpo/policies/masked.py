"""A masked language model of transformers as the policy; it predicts hidden tokens from both sides."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from lightning_mpo.errors import UserError
from lightning_mpo.policies import masked_checks
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.lora import Lora
from lightning_mpo.policies.masked_inputs import (
    RowInputs,
    find_inputs,
    first_position,
    freeze_unreached,
    head_bias,
)
from lightning_mpo.policies.model_kinds import ModelKind
from lightning_mpo.policies.quantization import Quantization
from lightning_mpo.policies.scoring import Likelihoods, ResponseTokens
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Rollout

BAR = -1e9
"""Logit of a barred id after scale and temperature. It is finite, so entropies are finite; its
probability is exactly 0.
"""


class MaskedPolicy(LoadedPolicy):
    """Scores the noised copies of responses with a masked language model.

    A model of transformers' masked class (BERT, ModernBERT, ESM), or one of its causal class, which
    then runs with full attention. MASK and PAD are barred: they have probability 0 in sampler and
    score, as a response that holds one is not finished. A PAD that also ends responses is not
    barred, as no response could end otherwise. The reference is that of `CausalPolicy`.

    Args:
        source: as in `CausalPolicy`.
        lora: adapters; None trains every weight.
        dtype: of the base weights.
        gradient_checkpointing: recompute activations in the backward pass.
        checkpoint: a Lightning checkpoint, or a folder of adapters, loaded on top of `source`.
        gather_rollouts: as in `CausalPolicy`.
        quantization: keeps the linear layers of the frozen base in 4 bits; needs `lora`.
        mask_token: the text of MASK; None: the tokenizer's mask token, or `mask_token_id` of the
            configuration.
        shift: whether the state at a position predicts the next token, as in Dream
            (arXiv:2508.15487 [S]).
        remote_code: whether code of the model's repository runs, as LLaDA and Dream need.
    """

    masked = True

    def __init__(
        self,
        source: str,
        lora: Lora | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        checkpoint: str | None = None,
        gather_rollouts: bool = True,
        quantization: Quantization | None = None,
        mask_token: str | None = None,
        shift: bool = False,
        remote_code: bool = False,
    ) -> None:
        super().__init__(
            source,
            lora=lora,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            share_prompts=False,
            checkpoint=checkpoint,
            gather_rollouts=gather_rollouts,
            quantization=quantization,
        )
        self.mask_token, self.shift, self.remote_code = mask_token, shift, remote_code
        self.kind = ModelKind(masked=True, remote_code=remote_code)
        self._inputs: RowInputs | None = None

    # --- before the weights are loaded ------------------------------------------------------------

    @cached_property
    def mask_id(self) -> int:
        """The id of MASK, which stands at hidden positions."""
        return masked_checks.find_mask(self.tokenizer, self.config, self.mask_token, self.source)

    @property
    def positions(self) -> int | None:
        positions = super().positions
        return None if positions is None else positions - self._first_position

    @cached_property
    def _first_position(self) -> int:
        return first_position(self.outline_network())

    @property
    def barred(self) -> tuple[int, ...]:
        """Ids of probability 0: MASK, PAD unless it ends responses, and those of the support."""
        return tuple(sorted({*self._never_drawn, *self.fixed_bar}))

    @cached_property
    def _never_drawn(self) -> tuple[int, ...]:
        pad = self.tokenizer.pad_token_id
        ids = {self.mask_id} if pad is None else {self.mask_id, pad}
        return tuple(sorted(id for id in ids - set(self.end_tokens) if id < self.vocabulary))

    @property
    def remarks(self) -> list[str]:
        remarks = super().remarks
        if self.kind.foreign(self.config):
            remarks.append(
                "code       of the model's repository runs in this process "
                "(`policy.remote_code: true`)"
            )
        return remarks

    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        masked_checks.refuse_causal_requests(request)
        super().check(request)
        masked_checks.check_mask(
            self.tokenizer, self.mask_id, self.end_tokens, self.mask_token, self.source
        )
        masked_checks.refuse_networks(self)

    # --- states and logits ------------------------------------------------------------------------

    def states(
        self, ids_BL: Tensor, attention_mask_BL: Tensor, *, reference: bool = False
    ) -> Tensor:
        """Return the states that predict the token at each position. Shape `[B, L, D]`.

        A state is the input of the head. If the model has a prediction transform, the state is its
        output. `logits` takes states.

        Args:
            ids_BL: tokens, with MASK at hidden positions.
            attention_mask_BL: False for padding on the left.
            reference: run the reference instead of the policy.
        """
        network = self._network(reference)
        assert self._inputs is not None
        with self.as_reference(reference):
            hidden_BLD = self._inputs.states(network, ids_BL, attention_mask_BL)
        return self._shifted(hidden_BLD)

    def _shifted(self, states_BLD: Tensor) -> Tensor:
        """Move each state to the position that it predicts; the first one has no other."""
        if not self.shift:
            return states_BLD
        return torch.cat([states_BLD[:, :1], states_BLD[:, :-1]], 1)

    def _head(self, reference: bool = False, **form: Any) -> Unembedding:
        """Read the head with the bias around it, and bar ids by that bias."""
        head = super()._head(reference, **form)
        around_V = head_bias(self._network(reference))
        if around_V is not None and reference:
            around_V = around_V.detach()
        return masked_checks.bar(head, around_V, self.barred, BAR)

    def logits(self, hidden_BD: Tensor, reference: bool = False) -> Tensor:
        logits_BV = super().logits(hidden_BD, reference)
        barred = torch.tensor(self.barred, device=logits_BV.device, dtype=torch.long)
        # below all others at any temperature
        return logits_BV.index_fill(1, barred, -torch.inf)

    def _check_network(self) -> None:
        # a form of attention masks that works
        quantised = self.quantization is not None or self.dtype != torch.float32
        tolerance = 0.05 if quantised else 1e-3
        ids = masked_checks.trial_ids(self.vocabulary, self.barred, self.mask_id)
        forms = masked_checks.mask_forms(self.kind, self.config)
        self._inputs = find_inputs(self.network, forms, ids, tolerance)
        # logits of the policy, and of the network, which counts positions itself
        row_1L = torch.tensor([ids], device=self.device)
        mask_1L = torch.ones_like(row_1L, dtype=torch.bool)
        network_LV = self.network_logits(self.network, row_1L)[0].float()
        with torch.enable_grad():
            used_LV = self.logits(self.states(row_1L, mask_1L)[0])
        freeze_unreached(self.network, used_LV)
        name = type(self.network).__name__
        masked_checks.compare_logits(name, used_LV.detach(), network_LV, self.barred, tolerance)

    def network_logits(self, network: Any, ids_CL: Tensor) -> Tensor:
        """Return the logits of a network itself, by the positions that they predict.

        Args:
            network: one like the policy's, which counts positions itself.
            ids_CL: rows without padding.

        Returns:
            Shape `[C, L, V]`; barred ids have the logits of the network.
        """
        assert self._inputs is not None
        mask_CL = torch.ones_like(ids_CL, dtype=torch.bool)
        arguments = self._inputs.without_positions().arguments(ids_CL, mask_CL)
        return self._shifted(network(**arguments).logits)

    # --- scores -----------------------------------------------------------------------------------

    def score(
        self,
        rollout: Rollout,
        mask_BT: Tensor,
        *,
        temperature: float,
        request: ScoreRequest = ScoreRequest(),  # noqa: B008  frozen
        reference: bool = False,
    ) -> TokenScores:
        """Return weighted sums of log-probs over the noised copies of the rows.

            log p(t) = Σ_c w_c(t) · log p(y_t | row, MASK at the hidden positions of copy c)

        The entropy is the mean over the copies that score a token. With gradient and several
        copies, the backward pass computes each copy again, so one graph is alive at a time [I].

        Args:
            rollout: with `hidden_BCL` and `copy_weights_BCT`.
            mask_BT: tokens to score.
            temperature: divisor of the logits.
            request: as in `Policy.score`.
            reference: score with the reference instead of the policy.

        Returns:
            Log-probs and entropies in nats, float32, shape `[B, T]`; 0 where no copy scores a token.

        Raises:
            UserError: the rollout holds no noised copies.
        """
        hidden_BCL, weights_BCT = rollout.hidden_BCL, rollout.copy_weights_BCT
        if hidden_BCL is None or weights_BCT is None:
            raise UserError(
                "a masked policy scores noised copies of rows, and the rollout holds none: give "
                "`objective.likelihood`, such as `CoupledElbo`"
            )
        # the copies that score a token; if none does, the first one gives each weight a gradient
        scored_BCT = mask_BT[:, None] & (weights_BCT > 0)
        used = scored_BCT.any(2).any(0).nonzero()[:, 0].tolist() or [0]
        one_graph = len(used) > 1 and torch.is_grad_enabled()
        # their weighted sum, one copy after another
        logprobs_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
        entropy_BT = torch.zeros_like(logprobs_BT)
        for c in used:
            hidden_BL, scored_BT = hidden_BCL[:, c], scored_BCT[:, c]
            options = (temperature, request.entropy_grad, reference)
            copy = partial(self._score_copy, rollout, hidden_BL, scored_BT, options)
            scores = recompute(copy, use_reentrant=False) if one_graph else copy()
            logprobs_BT = logprobs_BT + weights_BCT[:, c] * scores.logprobs_BT
            entropy_BT = entropy_BT + scores.entropy_BT
        entropy_BT = entropy_BT / scored_BCT.sum(1).clamp(min=1)
        return TokenScores(logprobs_BT, entropy_BT, on_support=rollout.support_BTK is not None)

    def _score_copy(
        self,
        rollout: Rollout,
        hidden_BL: Tensor,
        scored_BT: Tensor,
        options: tuple[float, bool, bool],
    ) -> Likelihoods:
        """Score tokens of the rows with MASK at the hidden positions."""
        temperature, entropy_grad, reference = options
        ids_BL = rollout.tokens_BL.masked_fill(hidden_BL, self.mask_id)
        states_BLD = self.states(ids_BL, rollout.attention_mask_BL, reference=reference)
        # the state of each response token, in the flattened rows
        B, L = ids_BL.shape
        index_BL = torch.arange(B * L, device=ids_BL.device).view(B, L)
        tokens = ResponseTokens.of(rollout, scored_BT, index_BL[:, rollout.prompt_length :])
        head = self._head(reference, temperature=temperature, **self.head_form)
        return tokens.logprobs(states_BLD, head, entropy_grad=entropy_grad)
