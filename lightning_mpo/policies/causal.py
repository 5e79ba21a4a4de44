"""A causal language model of transformers as the policy: full fine-tuning, LoRA or QLoRA."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.packing import lay_out, sees_everything
from lightning_mpo.policies.scoring import ResponseTokens
from lightning_mpo.policies.trunk import TrunkStates, record_norm_input
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Rollout


class CausalPolicy(LoadedPolicy):
    """Scores responses with a pretrained causal model. The reference is its state at the start.

    With LoRA the reference is the same base with adapters off, or with the adapters of
    `checkpoint`. Without LoRA it is a frozen copy. `LoadedPolicy` describes the options.
    """

    def decoder(self, reference: bool = False) -> nn.Module:
        """Return the network without its head: token ids to hidden states."""
        return self._network(reference).get_decoder()

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
        states = self.trunk_states(rollout, future=request.future > 0, reference=reference)
        tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
        form: dict[str, Any] = {"temperature": temperature, **self.head_form}
        # the next token
        likelihoods = tokens.logprobs(
            states.after_norm_RLD,
            self._head(reference, **form),
            entropy_grad=request.entropy_grad,
            logits=request.support_logits,
            candidates=request.candidates,
        )
        # tokens behind the next one, and once more with gradient in the heads alone
        future_BTM = upkeep_BTM = None
        if request.future and self.mtp is not None:
            detached, detach = states.detached(), self.mtp.detach_trunk
            of_loss = detached if detach else states
            future_BTM = self._future(of_loss, tokens, request.future, form)
            if request.upkeep and detach:
                upkeep_BTM = future_BTM
            elif request.upkeep:
                upkeep_BTM = self._future(detached, tokens, request.future, form)
        # values of the states
        values_BT = None
        if request.values and self.critic is not None:
            values_BT = self.critic.values(states, tokens.index_BT, mask_BT)
        return TokenScores(
            likelihoods.logprobs_BT,
            likelihoods.entropy_BT,
            future_BTM,
            upkeep_BTM,
            values_BT,
            likelihoods.support_logits_BTK,
            likelihoods.candidate_logprobs_BTK,
            on_support=rollout.support_BTK is not None,
        )

    def ranks(self, rollout: Rollout, mask_BT: Tensor, future: int = 0) -> Tensor:
        """Count the ids that are more probable than the true one, for each offset n = 0 … `future`.

        Returns:
            int64 `[B, T, 1 + future]`; 0 is the most probable id, and also stands where the window
            has left the mask.
        """
        with rollout_mode(self):
            states = self.trunk_states(rollout, future=future > 0)
            tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
            form = self.head_form
            ranks = [tokens.ranks(states.after_norm_RLD, self._head(**form))]
            if future and self.mtp is not None:
                for n, hidden_RLD in enumerate(self.mtp.hidden(states, future), start=1):
                    head = Unembedding.of(self.mtp.unembedding(n), **form)
                    ranks.append(tokens.ahead(n, keep_support=False).ranks(hidden_RLD, head))
        return torch.stack(ranks, -1)

    def top_k(self, rollout: Rollout, mask_BT: Tensor, k: int) -> Tensor:
        """Return the policy's k most probable tokens at each response token, best first.

        Returns:
            int32 `[B, T, k]`, 0 where masked.
        """
        with rollout_mode(self):
            states = self.trunk_states(rollout, future=False)
            tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
            return tokens.top_k(states.after_norm_RLD, self._head(**self.head_form), k)

    def trunk_states(
        self, rollout: Rollout, *, future: bool, reference: bool = False
    ) -> TrunkStates:
        """Run the trunk over the lines of a rollout.

        Args:
            rollout: rows.
            future: whether heads will read the states.
            reference: run the reference instead of the policy.
        """
        # rows into lines; heads that read ahead cannot share a prompt
        reads_ahead = future and self.mtp is not None and self.mtp.reads_ahead
        width = self.config.get_text_config().hidden_size
        lines = lay_out(
            rollout, share=self.can_share_prompts and not reads_ahead, hidden_size=width
        )
        # lines -> hidden states, behind the final norm and before it
        decoder = self.decoder(reference)
        recording: Any = record_norm_input(decoder) if future else nullcontext([])
        with self.as_reference(reference), recording as before_norm:
            after_norm_RLD = decoder(
                input_ids=lines.input_ids_RL,
                position_ids=lines.position_ids_RL,
                attention_mask=lines.attention_mask(),
                use_cache=False,
            ).last_hidden_state
        return TrunkStates(before_norm[0] if future else after_norm_RLD, after_norm_RLD, lines)

    def _future(
        self, states: TrunkStates, tokens: ResponseTokens, offsets: int, form: dict[str, Any]
    ) -> Tensor:
        """Return log q_n(o_{t+n} | h_t) for n = 1 … offsets, one offset in memory at a time.

        Returns:
            Log-probs, shape `[B, T, M]`.
        """
        assert self.mtp is not None
        keep_support = self.mtp.support == "stored"
        logprobs = []
        for n, hidden_RLD in enumerate(self.mtp.hidden(states, offsets), start=1):
            head = Unembedding.of(self.mtp.unembedding(n), **form)
            later = tokens.ahead(n, keep_support=keep_support)
            logprobs.append(later.logprobs(hidden_RLD, head, entropy=False).logprobs_BT)
        return torch.stack(logprobs, -1)

    @cached_property
    def can_share_prompts(self) -> bool:
        """True if the model takes a hand-made mask: full attention in all layers, through SDPA."""
        config = self._network(reference=False).config.get_text_config()
        is_sdpa = config._attn_implementation == "sdpa"
        return self.share_prompts and sees_everything(config) and is_sdpa
