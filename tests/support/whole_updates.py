"""The oracle of whole updates, first half: a case, its rows, and their scores one row at a time.

Only the network, its heads and its critic are shared with the package, as modules of weights. Each row runs through
them alone, without padding. The second half is `whole_update_losses.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

TEMPERATURE, LOW, HIGH = 1.3, 0.2, 0.25
VALUE_COEF, KL_COEF = 0.5, 0.3


@dataclass(frozen=True)
class Case:
    """An algorithm, and the form of the rollout that it learns from."""

    length: int = 3
    stride: int = 1
    tail: str | None = None
    source: str = "mtp"
    credit: str | None = None
    negatives: str = "keep"
    advantage: str = "gae"  # or "group"
    gamma: float = 1.0
    lam: float = 0.95
    action: int = 1  # tokens of an action in the advantage
    reduction: str = "tokens"  # or "sequences"
    share: float = 0.4
    upkeep: float = 0.3
    value_clip: float | None = 0.2
    kl: str | None = None  # "loss" or "reward"
    family: str = "medusa"
    detached: bool = False  # future terms do not reach the trunk
    critic: str = "hidden"
    support: str | None = None  # "six": always six ids, "slots": some of six, "gaps": see `Row`
    heads_support: str = "stored"
    share_prompts: bool = True
    mask_truncated: bool = False

    @property
    def offsets(self) -> int:
        """Offsets that heads predict."""
        return self.length - 1 if self.source == "mtp" else 0

    @property
    def renormalises(self) -> bool:
        """Whether a block that is cut short gives the weights of lost offsets to the others."""
        return self.tail == "renorm" or (self.tail is None and self.stride > 1)


@dataclass(frozen=True)
class Row:
    """A response as plain lists."""

    group: int
    prompt: list[int]
    response: list[int]
    supports: list[list[int] | None]  # of each response token; None: the whole vocabulary
    reward: float
    valid: bool
    learns: bool  # valid, and not cut off where such responses are left out
    counts: list[bool]  # False for tokens outside of their support, which carry no loss

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Start and end of the runs of tokens that count."""
        edges = [False, *self.counts, False]
        changes = [t for t in range(len(edges) - 1) if edges[t] != edges[t + 1]]
        return list(zip(changes[::2], changes[1::2], strict=True))


@dataclass(frozen=True)
class RowScores:
    """Log-probs and values of a row: `future[n - 1][t]` is log q_n(o_{t+n} | h_t)."""

    token: list[Tensor]
    future: list[list[Tensor]]
    upkeep: list[list[Tensor]]
    value: list[Tensor]


# --- scores of a row ------------------------------------------------------------------------------------------------


def score(case: Case, policy: nn.Module, row: Row) -> RowScores:
    """Run one row through network, heads and critic."""
    ids, first = torch.tensor([row.prompt + row.response]), len(row.prompt) - 1
    before, after = states(policy.decoder(), ids)
    weight = policy.network.get_output_embeddings().weight
    T = len(row.response)
    token = [
        logprob(after[0, first + t] @ weight.T, row.response[t], row.supports[t]) for t in range(T)
    ]
    # heads: with gradient in the trunk for the ratio, without for the upkeep
    free = (before.detach(), after.detach())
    ratio_states = free if case.detached else (before, after)
    future, upkeep = (
        [
            [
                logprob(
                    hidden[0, first + t] @ policy.mtp.unembedding(n).weight.T,
                    row.response[t + n],
                    row.supports[t + n] if case.heads_support == "stored" else None,
                )
                for t in range(T - n)
            ]
            for n, hidden in enumerate(head_states(policy, ids, *pair, case.offsets), start=1)
        ]
        for pair in (ratio_states, free)
    )
    # values of the states before each token
    value = []
    if case.advantage == "gae":
        trunk = getattr(policy.critic, "trunk", None)
        read = after if trunk is None else states(trunk, ids)[1]
        read = read.detach() if case.critic == "detached" else read
        value = [value_of(policy.critic.head, read[0, first + t]) for t in range(T)]
    return RowScores(token, future, upkeep, value)


def states(decoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states before and behind the final norm."""
    inputs: list[Tensor] = []
    handle = decoder.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    after = decoder(input_ids=ids, use_cache=False).last_hidden_state
    handle.remove()
    return inputs[0], after


def head_states(
    policy: nn.Module, ids: Tensor, before: Tensor, after: Tensor, offsets: int
) -> list[Tensor]:
    """Return the states whose unembedding predicts the tokens n = 1 … `offsets` behind the next one."""
    decoder, heads, L = policy.decoder(), policy.mtp, ids.shape[1]
    positions = torch.arange(L)[None]

    def decode(layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer(
            hidden,
            attention_mask=torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )

    result, chain = [], after
    for n in range(1, offsets + 1):
        if heads.family == "medusa":
            hidden = after @ heads.residual[n - 1].weight.T
            result.append(after + hidden * torch.sigmoid(hidden))
        elif heads.family == "parallel":
            result.append(decoder.norm(decode(heads.layers[n - 1], before)))
        else:
            ahead = torch.cat([ids[:, n:], torch.zeros(1, n, dtype=ids.dtype)], 1)
            embedded = heads.enorm[n - 1](decoder.embed_tokens(ahead).detach())
            pair = torch.cat([embedded, heads.hnorm[n - 1](chain)], -1)
            chain = decode(heads.layers[n - 1], heads.eh_proj[n - 1](pair))
            result.append(heads.norm[n - 1](chain))
    return result


def logprob(logits: Tensor, token: int, support: list[int] | None) -> Tensor:
    """Return log π(token) over the vocabulary, or over the ids of a support."""
    logits = logits / TEMPERATURE
    if support is None:
        return logits.log_softmax(0)[token]
    return logits[support].log_softmax(0)[support.index(token)]


def value_of(head: nn.Module, hidden: Tensor) -> Tensor:
    for layer in head:
        linear = isinstance(layer, nn.Linear)
        hidden = layer.weight @ hidden + layer.bias if linear else hidden * torch.sigmoid(hidden)
    return hidden[0]


def reference_logprobs(policy: nn.Module, row: Row) -> list[float]:
    """Return the log-probs of the frozen reference."""
    network, first = policy.reference.network, len(row.prompt) - 1
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([row.prompt + row.response])).logits[0]
    return [
        logprob(logits[first + t], token, row.supports[t]).item()
        for t, token in enumerate(row.response)
    ]


@contextmanager
def in_float64() -> Iterator[None]:
    """Let norms and positions of Llama compute in float64: they round to float32 whatever the weights are."""
    from transformers.models.llama import modeling_llama as llama

    def norm(self, hidden):
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def positions(self, hidden, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.LlamaRMSNorm, "forward", norm)
        patch.setattr(llama.LlamaRotaryEmbedding, "forward", positions)
        yield
