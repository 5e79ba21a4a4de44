"""The sampler interface: prompts in, a `Rollout` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.supports import Support
from lightning_mpo.types import PromptBatch, Rollout

Progress = Callable[[int, int], None]
"""Called with (tokens sampled since the last call, rows still running)."""


class Sampler(ABC):
    """Draws responses from a policy and records what the objective needs of the distribution it drew from."""

    @abstractmethod
    def sample(
        self,
        policy: CausalPolicy,
        prompts: PromptBatch,
        completions: int,
        *,
        support: Support,
        temperature: float,
        max_new_tokens: int,
        generator: torch.Generator,
        greedy: bool = False,
        progress: Progress | None = None,
        candidates: int = 0,
    ) -> Rollout:
        """Return `completions` responses per prompt, a group's rows side by side.

        Args:
            policy: weights to sample from.
            prompts: P prompts.
            completions: G.
            support: restricts every step; stored in the rollout.
            temperature: logits are divided by it before the support is chosen.
            max_new_tokens: longest response.
            generator: source of all randomness, on the CPU.
            greedy: take the most probable token instead; temperature then only scales the recorded log-probs.
            progress: told after every step.
            candidates: K, how many of the most probable ids of each step are recorded with their log-probs, besides the
                sampled token (`functional.supports.candidates`); 0: none.
        """


def candidate_options(sampler: Sampler, candidates: int) -> dict[str, Any]:
    """Return what `sample` is told of candidates: nothing unless they are asked for, so that it may do without.

    Raises:
        UserError: they are asked for, and the sampler's `sample` does not take the argument.
    """
    if not candidates:
        return {}
    takes = signature(sampler.sample).parameters
    if "candidates" not in takes and not any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
        raise UserError(
            f"`rollout.sampler` {type(sampler).__name__} records no candidates, of which `objective.surrogate` compares "
            f"{candidates}: give `sample` the argument `candidates`, use LocalSampler, or set `top_k: null`"
        )
    return {"candidates": candidates}


def decode(policy: Policy, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[str, ...]:
    """Return the text of each response, without the tokens that begin, end or pad one.

    Other special tokens stay: `<answer>` may be one, and rewards are to read it.
    """
    rows = [row[mask].tolist() for row, mask in zip(tokens_BT.cpu(), mask_BT.cpu(), strict=True)]
    return decode_tokens(policy.tokenizer, rows, policy.end_tokens)


def decode_tokens(tokenizer: Any, rows: Sequence[Sequence[int]], end_tokens: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each row of ids, without the tokens that begin, end or pad a text."""
    frame = {*end_tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    kept = [[token for token in row if token not in frame] for row in rows]
    return tuple(tokenizer.batch_decode(kept, skip_special_tokens=False))
