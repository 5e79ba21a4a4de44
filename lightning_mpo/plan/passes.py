"""Peak memory of forward and backward passes, from a shallow network on tensors without data."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.functional import heads
from lightning_mpo.functional.head_logits import Head
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import Support
from lightning_mpo.plan.trace import extrapolate, peak_of, without_data
from lightning_mpo.plan.weights import shallow_network
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.packing import Lines, lay_out, sees_everything
from lightning_mpo.types import Rollout


def support_size(support: Support) -> int:
    """Return the most ids that a support stores at a token; 0: it stores none."""
    return support.slots or 0


class Passes:
    """Passes of a policy over rows of full length.

    Args:
        policy: not built.
        objective: its support and likelihood set the cost of the head.
        prompt: S, tokens of the longest prompt.
        rollout: of which G rows share a prompt.
        trainer: its precision holds.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        objective: Objective,
        prompt: int,
        rollout: RolloutLoop,
        trainer: L.Trainer,
    ) -> None:
        self.policy, self.support, self.trainer = policy, objective.support, trainer
        self.likelihood: Likelihood | None = objective.likelihood
        self.prompt, self.completions, self.sampler = prompt, rollout.completions, rollout.sampler
        self.config = policy.config.get_text_config()

    def peak(
        self,
        rows: int,
        response: int,
        *,
        head: bool = True,
        backward: bool = False,
        passes: int = 1,
    ) -> int:
        """Return the bytes at the peak of a pass, weights not counted.

        Args:
            rows: number of rows.
            response: tokens of each response; 1: prompts alone.
            head: score the response tokens as well.
            backward: train.
            passes: 2: with the gradients of an earlier pass in place.
        """
        inputs = self.rows_of(rows, response)
        scored = self.tokens(rows, response) if head else None

        def peak_of_layers(layers: int) -> int:
            network = shallow_network(self.policy, layers)

            def work() -> None:
                with torch.set_grad_enabled(backward):
                    for _ in range(passes):
                        self._pass(network, inputs, scored, backward)

            with without_data(network):
                return peak_of(work, network)

        return extrapolate(peak_of_layers, self.config.num_hidden_layers)

    def tokens(self, rows: int, response: int) -> int:
        """Return how many tokens of the rows the head scores."""
        return rows * response

    def rows_of(self, rows: int, response: int) -> Any:
        """Lay out rows of full length as the policy does, the completions of a prompt together."""
        length = self.prompt + response
        rollout = Rollout(
            tokens_BL=torch.ones(rows, length, dtype=torch.long),
            attention_mask_BL=torch.ones(rows, length, dtype=torch.bool),
            response_mask_BT=torch.ones(rows, response, dtype=torch.bool),
            group_B=torch.arange(rows) // self.completions,
            behaviour_logprobs_BT=torch.zeros(rows, response),
            finish_B=torch.zeros(rows, dtype=torch.long),
        )
        share = self.policy.share_prompts and sees_everything(self.config)
        return lay_out(rollout, share=share, hidden_size=self.config.hidden_size)

    def states(self, network: Any, rows: Any) -> Tensor:
        """Return hidden states of the rows of `rows_of`."""
        lines: Lines = rows
        mask = lines.attention_mask()
        shapes = [lines.input_ids_RL.shape, lines.position_ids_RL.shape]
        ids, positions = (torch.zeros(shape, dtype=torch.long) for shape in shapes)
        return network.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None if mask is None else torch.ones(mask.shape, dtype=mask.dtype),
            use_cache=False,
        ).last_hidden_state

    def _pass(self, network: Any, rows: Any, scored: int | None, backward: bool) -> None:
        """Run the trunk over rows, and the head over so many of their tokens (None: no head)."""
        with self.trainer.precision_plugin.forward_context():
            hidden = self.states(network, rows)
            total: Tensor = hidden.sum()
            if scored is not None:
                total = self._head(network, hidden.flatten(0, 1), scored)
        # here, where the hidden states are still in memory, as in training
        if backward:
            total.backward()

    def _head(self, network: Any, hidden_nD: Tensor, tokens: int) -> Tensor:
        head = Head(network.get_output_embeddings().weight)
        index_n = torch.zeros(tokens, dtype=torch.long)
        hidden_nD = hidden_nD[index_n]
        K = support_size(self.support)
        if K:
            support_nK = torch.zeros(tokens, K, dtype=torch.int32)
            return heads.support_logprobs(hidden_nD, head, index_n, support_nK)[0].sum()
        return heads.full_logprobs(hidden_nD, head, index_n)[0].sum()
