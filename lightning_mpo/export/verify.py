"""Whether what was written is the policy: log-probs and greedy texts, before and after, in float32 on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.checkpoints import HEADS, read_safetensors
from lightning_mpo.sampling.base import SamplingRequest, decode_tokens
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import GenerationConfig

LARGEST = 1e-3
"""Nats that a log-prob may differ by, at most, where no weight was rounded."""
MEAN, QUANTILE = 0.06, 0.3
"""Nats that log-probs may differ by where weights were rounded: on average, and at the 99th percentile."""
TELLING = 1e-3
"""Nats (root mean square) that training must have moved log-probs by, for the kept share to be judged."""


@dataclass(frozen=True)
class Observed:
    """What a policy says, in float32."""

    sampled: Rollout
    logprobs_n: Tensor  # of the sampled tokens
    base_logprobs_n: Tensor | None  # the same with adapters off
    greedy: Rollout  # with the two most probable ids of each step as candidates


@dataclass(frozen=True)
class Check:
    """How far what was reloaded is from the policy."""

    tokens: int
    largest: float  # nats
    mean: float
    quantile: float  # 99th percentile
    same_texts: int
    texts: int
    moved: (
        float | None
    )  # root mean square of what training changed in log-probs, nats; None: there is no base
    kept: float | None  # the share of that which was found again
    problems: tuple[str, ...]

    def __str__(self) -> str:
        kept = (
            ""
            if self.kept is None
            else f"; {self.kept:.1%} of what training changed ({self.moved:.2g} nats) is there"
        )
        return (
            f"log-probs of {self.tokens} tokens differ by at most {self.largest:.2g} nats (mean {self.mean:.2g}), "
            f"{self.same_texts} of {self.texts} greedy texts are equal{kept}"
        )


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Compute in float32 for a while, so that weights are compared and not rounding; a quantised network stays as it is."""
    weights = list(network.parameters())
    narrow = [
        (weight, weight.dtype)
        for weight in weights
        if weight.dtype in (torch.bfloat16, torch.float16)
    ]
    if not all(weight.is_floating_point() for weight in weights):
        narrow = []
    for weight, _ in narrow:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, dtype in narrow:
            weight.data = weight.data.to(dtype)


def observe(
    policy: CausalPolicy, prompts: PromptBatch, temperature: float, tokens: int = 24
) -> Observed:
    """Sample once per prompt, and once greedily; score what was sampled.

    Args:
        policy: a built one; it comes back as it was.
        prompts: what to say something about.
        temperature: of the sampling and of the log-probs.
        tokens: longest response.
    """
    request = SamplingRequest(FullVocabulary(), temperature, tokens)
    with in_float32(policy._network()), rollout_mode(policy):
        sampled = LocalSampler().sample(
            policy, prompts, 1, request, generator=generator_of(0, Stream.CHECK)
        )
        best = replace(request, greedy=True, candidates=2)
        greedy = LocalSampler().sample(
            policy, prompts, 1, best, generator=generator_of(0, Stream.CHECK)
        )
        mask_BT = sampled.response_mask_BT

        def logprobs() -> Tensor:
            return policy.score(sampled, mask_BT, temperature=temperature).logprobs_BT[mask_BT]

        logprobs_n, base_logprobs_n = logprobs(), None
        if policy.lora is not None:
            with (
                policy._adapters.disable_adapter()
            ):  # not as the reference, which may have adapters of its own
                base_logprobs_n = logprobs()
        return Observed(sampled, logprobs_n, base_logprobs_n, greedy)


def compare(
    seen: Observed,
    network: Any,
    tokenizer: Any,
    generation: GenerationConfig,
    temperature: float,
    *,
    rounded: bool,
) -> Check:
    """Ask a reloaded model for the same log-probs and greedy texts.

    Args:
        seen: what the policy said.
        network: the reloaded model.
        tokenizer: the reloaded one.
        generation: the reloaded one; its end tokens end greedy texts.
        temperature: as in `observe`.
        rounded: whether weights were rounded on the way.
    """
    with in_float32(network), torch.inference_mode(), _quiet():
        logprobs_n = torch.cat(
            [
                _logprobs(network, seen.sampled, b, temperature)
                for b in range(len(seen.sampled.group_B))
            ]
        )
        texts = [
            _greedy(network, seen.greedy, b, generation) for b in range(len(seen.greedy.group_B))
        ]
    off_n = (logprobs_n - seen.logprobs_n).abs()
    largest, mean, quantile = off_n.max().item(), off_n.mean().item(), off_n.quantile(0.99).item()
    problems = []
    if rounded and (mean > MEAN or quantile > QUANTILE):
        problems.append(
            f"log-probs differ by {mean:.2g} nats on average and {quantile:.2g} at the 99th percentile"
        )
    if not rounded and not largest <= LARGEST:
        problems.append(f"log-probs differ by up to {largest:.2g} nats")
    ends = (
        generation.eos_token_id
        if isinstance(generation.eos_token_id, list)
        else [generation.eos_token_id]
    )
    same = 0
    for b, tokens in enumerate(texts):
        wanted = seen.greedy.responses_BT[b][seen.greedy.response_mask_BT[b]].tolist()
        if decode_tokens(tokenizer, [tokens], ends) == (seen.greedy.texts[b],) and tokens == wanted:
            same += 1
        elif _margin(seen.greedy, b, tokens, wanted) > (2 * QUANTILE if rounded else 2 * LARGEST):
            problems.append(
                f"the greedy text of prompt {b} is {tokenizer.decode(tokens)[:60]!r}, not {seen.greedy.texts[b][:60]!r}"
            )
    moved = kept = None
    if seen.base_logprobs_n is not None:
        change_n = seen.logprobs_n - seen.base_logprobs_n
        moved = change_n.square().mean().sqrt().item()
        if moved > TELLING:
            kept = (
                ((logprobs_n - seen.base_logprobs_n) * change_n).sum() / change_n.square().sum()
            ).item()
            if kept < 0.5:
                problems.append(f"only {kept:.0%} of what training changed is there")
    return Check(
        len(off_n), largest, mean, quantile, same, len(texts), moved, kept, tuple(problems)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of sampling options, which greedy decoding does not use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _prompt(rollout: Rollout, b: int) -> Tensor:
    S = rollout.prompt_length
    return rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]


def _logprobs(network: Any, rollout: Rollout, b: int, temperature: float) -> Tensor:
    """Return the log-probs of one response, from a row without padding. Shape `[n]`."""
    prompt, response = _prompt(rollout, b), rollout.responses_BT[b][rollout.response_mask_BT[b]]
    logits_LV = (
        network(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0].float()
    )
    table_nV = (logits_LV[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return table_nV.gather(1, response[:, None])[:, 0]


def _greedy(network: Any, rollout: Rollout, b: int, generation: GenerationConfig) -> list[int]:
    from transformers import GenerationConfig

    prompt, limit = _prompt(rollout, b), rollout.response_mask_BT.shape[1]
    said = network.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=generation.eos_token_id,
            pad_token_id=generation.pad_token_id,
        ),
    )
    return said[0, len(prompt) :].tolist()


def _margin(greedy: Rollout, b: int, tokens: list[int], wanted: list[int]) -> float:
    """Return by how many nats the policy preferred its token where two greedy texts part."""
    assert greedy.candidate_logprobs_BTK is not None
    at = next(
        (t for t, (own, other) in enumerate(zip(wanted, tokens, strict=False)) if own != other),
        None,
    )
    if at is None:  # one text ends where the other goes on
        return float("inf")
    first, second = greedy.candidate_logprobs_BTK[b, at].topk(2).values.tolist()
    return first - second


def check_heads(policy: CausalPolicy, folder: Path) -> str | None:
    """Compare multi-token heads with the file of them; return what is wrong."""
    if policy.mtp is None:
        return None
    stored, own = read_safetensors(folder / HEADS, str(folder)), policy.mtp.state_dict()
    wrong = [
        name for name in own if name not in stored or not torch.equal(stored[name], own[name].cpu())
    ]
    return f"the head's weight {wrong[0]!r} is not what was written" if wrong else None
