"""The sampler interface: prompts in, a `Rollout` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import Support
from lightning_mpo.policies.base import Policy
from lightning_mpo.types import PromptBatch, Rollout

Progress = Callable[[int, int], None]
"""Called with (tokens sampled since the last call, rows still running)."""


@dataclass(frozen=True)
class SamplingRequest:
    """Options of sampling, besides the policy, the prompts and the randomness.

    Args:
        support: tokens that each step may draw; stored in the rollout.
        temperature: logits are divided by it before the support is chosen.
        max_new_tokens: longest response.
        greedy: take the most probable token instead; temperature then only scales the recorded
            log-probs.
        candidates: K, how many of the most probable ids of each step are recorded with their
            log-probs, besides the sampled token (`functional.supports.candidates`); 0: none.
        stop: ids that end a response besides the policy's end tokens.
    """

    support: Support
    temperature: float
    max_new_tokens: int
    greedy: bool = False
    candidates: int = 0
    stop: tuple[int, ...] = ()


class Sampler(ABC):
    """Draws responses from a policy and records the distributions that it drew from."""

    records_candidates = False
    """True if the sampler records `SamplingRequest.candidates`."""
    stops = False
    """True if the sampler ends responses with the ids of `SamplingRequest.stop`."""
    left_to_right = True
    """False if tokens are drawn in another order, so that a prefix is no state of the sampler."""

    @abstractmethod
    def sample(
        self,
        policy: Policy,
        prompts: PromptBatch,
        completions: int,
        request: SamplingRequest,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Rollout:
        """Return `completions` responses per prompt, a group's rows side by side.

        Args:
            policy: weights to sample from.
            prompts: P prompts.
            completions: G.
            request: options of sampling.
            generator: source of all randomness, on the CPU.
            progress: called after every step.
        """

    def check(self, candidates: int) -> None:
        """Refuse an objective that compares candidates which this sampler does not record.

        Args:
            candidates: K of the objective's surrogate; 0: none.

        Raises:
            UserError: `records_candidates` is False and `candidates` is not 0.
        """
        if candidates and not self.records_candidates:
            raise UserError(
                f"`rollout.sampler` {type(self).__name__} records no candidates, of which "
                f"`objective.surrogate` compares {candidates}: record them and set "
                "`records_candidates = True` in the class, use LocalSampler, or set `top_k: null`"
            )

    def check_stop(self, stop: Sequence[int | str]) -> None:
        """Refuse tokens that end responses if this sampler does not heed them.

        Args:
            stop: `rollout.stop`.

        Raises:
            UserError: `stops` is False and there are such tokens.
        """
        if stop and not self.stops:
            raise UserError(
                f"`rollout.sampler` {type(self).__name__} does not end responses with "
                "`rollout.stop`: end them there with the ids of `SamplingRequest.stop` and set "
                "`stops = True` in the class, use LocalSampler, or set `stop: null`"
            )

    def check_policy(self, policy: Policy) -> None:
        """Refuse a policy from which this sampler cannot draw, before its weights are loaded.

        Args:
            policy: its weights need not be loaded.

        Raises:
            UserError: the sampler is for another kind; the message names the policy and a remedy.
        """

    def check_canvas(self, max_new_tokens: int) -> None:
        """Refuse a longest response that the options of this sampler do not fit.

        Args:
            max_new_tokens: longest response, tokens.

        Raises:
            UserError: names the option.
        """


def decode(policy: Policy, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[str, ...]:
    """Return the text of each response, without the tokens that begin, end or pad one.

    Other special tokens stay: `<answer>` may be one, and rewards are to read it.
    """
    rows = [row[mask].tolist() for row, mask in zip(tokens_BT.cpu(), mask_BT.cpu(), strict=True)]
    return decode_tokens(policy.tokenizer, rows, policy.end_tokens)


def decode_tokens(
    tokenizer: Any, rows: Sequence[Sequence[int]], end_tokens: Sequence[int]
) -> tuple[str, ...]:
    """Return the text of each row of ids, without the tokens that begin, end or pad a text."""
    frame = {*end_tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    inner = [[token for token in row if token not in frame] for row in rows]
    return tuple(tokenizer.batch_decode(inner, skip_special_tokens=False))
