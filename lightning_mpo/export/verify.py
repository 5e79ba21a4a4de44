"""Compares a policy with its reloaded export: log-probs and greedy texts, both in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mpo.export.reloaded import Reloaded
from lightning_mpo.export.samples import draw
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.checkpoints import HEADS, read_safetensors
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.sampling.base import Sampler, decode_tokens
from lightning_mpo.types import PromptBatch, Rollout

LARGEST = 1e-3
"""Largest difference of a log-prob in nats, where no weight was rounded."""
MEAN, QUANTILE = 0.06, 0.3
"""Differences of log-probs in nats, where weights were rounded: mean and 99th percentile."""
TELLING = 1e-3
"""Least change of log-probs by training, in nats (root mean square), whose share is judged."""


@dataclass(frozen=True)
class Observed:
    """Log-probs and greedy texts of a policy, in float32.

    A masked policy has log-probs of noised copies. Its greedy tokens are compared at the step that
    revealed them.
    """

    sampled: Rollout
    logprobs_n: Tensor  # of the sampled tokens
    base_logprobs_n: Tensor | None  # the same with adapters off
    greedy: Rollout  # with the two most probable ids of each step as candidates


@dataclass(frozen=True)
class Check:
    """Distance of a reloaded model from the policy."""

    tokens: int
    largest: float  # nats
    mean: float
    quantile: float  # 99th percentile
    same_texts: int
    texts: int
    # root mean square of training's change of log-probs, nats; None: there is no base
    moved: float | None
    recovered: float | None  # the share of this change that the reloaded model has
    problems: tuple[str, ...]

    def __str__(self) -> str:
        share = ""
        if self.recovered is not None:
            share = (
                f"; {self.recovered:.1%} of what training changed ({self.moved:.2g} nats) is there"
            )
        return (
            f"log-probs of {self.tokens} tokens differ by at most {self.largest:.2g} nats (mean "
            f"{self.mean:.2g}), {self.same_texts} of {self.texts} greedy texts are equal{share}"
        )


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Compute in float32 within this context, to compare weights and not rounding.

    A quantised network stays as it is.
    """
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
    policy: LoadedPolicy,
    prompts: PromptBatch,
    temperature: float,
    tokens: int = 24,
    sampler: Sampler | None = None,
) -> Observed:
    """Sample once per prompt, and once greedily; score the samples.

    Args:
        policy: a built one; it comes back as it was.
        prompts: prompts of the observed responses.
        temperature: of the sampling and of the log-probs.
        tokens: longest response; a masked policy takes the whole blocks that fit, at least one.
        sampler: of the run; a masked policy takes its block and its tokens per step.
    """
    with in_float32(policy.network), rollout_mode(policy), policy.without_fixed_bar():
        sampled, greedy = draw(policy, prompts, temperature, tokens, sampler)
        mask_BT = sampled.response_mask_BT

        def logprobs() -> Tensor:
            return policy.score(sampled, mask_BT, temperature=temperature).logprobs_BT[mask_BT]

        logprobs_n, base_logprobs_n = logprobs(), None
        # without adapters, and not as the reference, which may have adapters of its own
        if policy.lora is not None:
            with policy.adapters.disable_adapter():
                base_logprobs_n = logprobs()
        return Observed(sampled, logprobs_n, base_logprobs_n, greedy)


def compare(expected: Observed, reloaded: Reloaded, temperature: float, *, rounded: bool) -> Check:
    """Compare log-probs and greedy texts of a reloaded model with those of the policy.

    Args:
        expected: observations of the policy.
        reloaded: the reloaded model; its end tokens end greedy texts.
        temperature: as in `observe`.
        rounded: weights were rounded on the way.
    """
    network = reloaded.network
    sampled, greedy = expected.sampled, expected.greedy
    with in_float32(network), torch.inference_mode(), _quiet():
        rows = range(len(sampled.group_B))
        logprobs_n = torch.cat([reloaded.logprobs(sampled, b, temperature) for b in rows])
        texts = [reloaded.greedy(greedy, b) for b in range(len(greedy.group_B))]
    # log-probs
    off_n = (logprobs_n - expected.logprobs_n).abs()
    largest, mean, quantile = off_n.max().item(), off_n.mean().item(), off_n.quantile(0.99).item()
    problems = []
    if rounded and (mean > MEAN or quantile > QUANTILE):
        problems.append(
            f"log-probs differ by {mean:.2g} nats on average and {quantile:.2g} at the 99th "
            "percentile"
        )
    if not rounded and not largest <= LARGEST:
        problems.append(f"log-probs differ by up to {largest:.2g} nats")
    # greedy texts, and the part of training's change that is there
    different = _different_texts(greedy, texts, reloaded)
    tie = 2 * QUANTILE if rounded else 2 * LARGEST
    problems += [text for text, margin in different if margin > tie]
    moved, recovered = _change(expected, logprobs_n)
    if recovered is not None and recovered < 0.5:
        problems.append(f"only {recovered:.0%} of what training changed is there")
    same = len(texts) - len(different)
    numbers = len(off_n), largest, mean, quantile, same, len(texts), moved, recovered
    return Check(*numbers, problems=tuple(problems))


def _different_texts(
    greedy: Rollout, texts: list[list[int]], reloaded: Reloaded
) -> list[tuple[str, float]]:
    """Return, for each greedy text that differs, a message and the policy's preference in nats.

    Args:
        greedy: the policy's texts.
        texts: token ids of the reloaded model's texts.
        reloaded: its tokenizer decodes.
    """
    ends = reloaded.generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    different = []
    for b, tokens in enumerate(texts):
        expected = greedy.responses_BT[b][greedy.response_mask_BT[b]].tolist()
        decoded = decode_tokens(reloaded.tokenizer, [tokens], ends)
        if decoded == (greedy.texts[b],) and tokens == expected:
            continue
        message = (
            f"the greedy text of prompt {b} is {reloaded.tokenizer.decode(tokens)[:60]!r}, not "
            f"{greedy.texts[b][:60]!r}"
        )
        different.append((message, _margin(greedy, b, tokens, expected)))
    return different


def _change(expected: Observed, logprobs_n: Tensor) -> tuple[float | None, float | None]:
    """Return the root mean square of training's change, and the share of it in a reloaded model.

    The first is None without a base to compare with, the second also where the change is too small.
    """
    if expected.base_logprobs_n is None:
        return None, None
    change_n = expected.logprobs_n - expected.base_logprobs_n
    moved = change_n.square().mean().sqrt().item()
    if moved <= TELLING:
        return moved, None
    reloaded_n = logprobs_n - expected.base_logprobs_n
    return moved, ((reloaded_n * change_n).sum() / change_n.square().sum()).item()


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


def _margin(greedy: Rollout, b: int, tokens: list[int], expected: list[int]) -> float:
    """Return by how many nats the policy preferred its token where two greedy texts diverge."""
    assert greedy.candidate_logprobs_BTK is not None
    at = next(
        (t for t, pair in enumerate(zip(expected, tokens, strict=False)) if pair[0] != pair[1]),
        None,
    )
    if at is None:  # one text ends where the other goes on
        return float("inf")
    first, second = greedy.candidate_logprobs_BTK[b, at].topk(2).values.tolist()
    return first - second


def check_heads(policy: LoadedPolicy, folder: Path) -> str | None:
    """Return a message on a multi-token head that differs from its file, or None."""
    if policy.mtp is None:
        return None
    stored, trained = read_safetensors(folder / HEADS, str(folder)), policy.mtp.state_dict()
    wrong = [
        name
        for name in trained
        if name not in stored or not torch.equal(stored[name], trained[name].cpu())
    ]
    return f"the head's weight {wrong[0]!r} is not what was written" if wrong else None
