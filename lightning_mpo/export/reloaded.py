"""Log-probs and greedy texts of a reloaded network, row by row and without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.types import NEVER, Rollout

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Reloaded:
    """Model in eval mode, tokenizer and generation options of an exported folder."""

    network: Any
    tokenizer: Any
    generation: GenerationConfig

    def logprobs(self, rollout: Rollout, b: int, temperature: float) -> Tensor:
        """Return the log-probs of the tokens of one response. Shape `[n]`."""
        prompt, response = prompt_of(rollout, b), rollout.responses_BT[b]
        response = response[rollout.response_mask_BT[b]]
        ids_1L = torch.cat([prompt, response])[None]
        logits_LV = self.network(input_ids=ids_1L, use_cache=False).logits[0].float()
        table_nV = (logits_LV[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        return table_nV.gather(1, response[:, None])[:, 0]

    def greedy(self, rollout: Rollout, b: int) -> list[int]:
        """Return the most probable tokens behind the prompt of one response."""
        from transformers import GenerationConfig

        prompt, limit = prompt_of(rollout, b), rollout.response_mask_BT.shape[1]
        options = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=self.generation.eos_token_id,
            pad_token_id=self.generation.pad_token_id,
        )
        # barred ids and texts that stop are of the folder's options, which would be added
        self.network.generation_config = options
        output = self.network.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            generation_config=options,
        )
        return output[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class ReloadedMasked(Reloaded):
    """A reloaded masked language model.

    Args:
        policy: the exported policy; its MASK, barred ids and form of attention masks are used.
    """

    policy: MaskedPolicy

    def logprobs(self, rollout: Rollout, b: int, temperature: float) -> Tensor:
        """Return the log-probs of the tokens of one response under its noised copies."""
        hidden_BCL, weights_BCT = rollout.hidden_BCL, rollout.copy_weights_BCT
        assert hidden_BCL is not None
        assert weights_BCT is not None
        hidden_CT = hidden_BCL[b][:, rollout.prompt_length :]
        table_CTV = (self._logits(rollout, b, hidden_CT) / temperature).log_softmax(-1)
        C, T, _ = table_CTV.shape
        index_CT1 = rollout.responses_BT[b].expand(C, T)[..., None]
        logprobs_CT = table_CTV.gather(2, index_CT1)[..., 0]
        sums_T = torch.where(weights_BCT[b] > 0, weights_BCT[b] * logprobs_CT, 0.0).sum(0)
        return sums_T[rollout.response_mask_BT[b]]

    def greedy(self, rollout: Rollout, b: int) -> list[int]:
        """Return the most probable token of each position, at the step that revealed it."""
        best_T = most_probable(self.policy, rollout, b, self._logits)[0][:, 0]
        return best_T[rollout.response_mask_BT[b]].tolist()

    def _logits(self, rollout: Rollout, b: int, hidden_CT: Tensor) -> Tensor:
        """Return the network's logits of the response in its copies. Shape `[C, T, V]`."""
        ids_CL, T = copies_of(self.policy, rollout, b, hidden_CT), hidden_CT.shape[1]
        logits_CTV = self.policy.network_logits(self.network, ids_CL)[:, -T:].float()
        barred = torch.tensor(self.policy.barred, device=ids_CL.device, dtype=torch.long)
        return logits_CTV.index_fill(2, barred, -torch.inf)


def prompt_of(rollout: Rollout, b: int) -> Tensor:
    """Return the prompt of a row without its padding."""
    S = rollout.prompt_length
    return rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]


def copies_of(policy: MaskedPolicy, rollout: Rollout, b: int, hidden_CT: Tensor) -> Tensor:
    """Return copies of a row without padding, with MASK at hidden positions. Shape `[C, L]`."""
    prompt, C = prompt_of(rollout, b), len(hidden_CT)
    responses_CT = rollout.responses_BT[b].expand(C, -1).masked_fill(hidden_CT, policy.mask_id)
    return torch.cat([prompt.expand(C, -1), responses_CT], 1)


def most_probable(policy: MaskedPolicy, rollout: Rollout, b: int, logits: Any) -> tuple[Any, Any]:
    """Return the two most probable ids of each position, and their log-probs in nats.

    Each position is read at the step that revealed it: its token and those of later steps are
    hidden.

    Args:
        policy: names MASK.
        rollout: with the steps of its sampler.
        b: the row.
        logits: takes (rollout, b, hidden_CT) and returns logits `[C, T, V]`.

    Returns:
        ids and log-probs, each `[T, 2]`. A position that no step revealed has its own id twice, with
        log-prob 0.
    """
    assert rollout.reveal_BT is not None
    reveal_T, response_T = rollout.reveal_BT[b].long(), rollout.responses_BT[b]
    ids_T2 = response_T[:, None].repeat(1, 2)
    logprobs_T2 = torch.zeros(ids_T2.shape, device=ids_T2.device)
    for step in reveal_T[reveal_T != NEVER].unique():
        revealed_T = reveal_T == step
        logits_TV = logits(rollout, b, (reveal_T >= step)[None])[0]
        best = logits_TV[revealed_T].log_softmax(-1).topk(2)
        ids_T2[revealed_T], logprobs_T2[revealed_T] = best.indices, best.values
    return ids_T2, logprobs_T2
