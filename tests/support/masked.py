"""Small masked policies, rollouts with noised copies, and a naive score of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.policies import MaskedPolicy, TinyMaskedPolicy
from lightning_mpo.types import Rollout
from tests.support.builders import CHARACTERS, END, PAD, make_rollout, seeded

MASK = 2


def make_masked(
    *,
    seed: int = 0,
    sharp: float = 6.0,
    reference: bool = False,
    double: bool = False,
    prepare: Callable | None = None,
    **options: Any,
) -> TinyMaskedPolicy:
    """Return a built `TinyMaskedPolicy` whose weights are scaled by `sharp`."""
    arguments = {"characters": CHARACTERS, "hidden_size": 32, "layers": 2, "heads": 2} | options
    policy = TinyMaskedPolicy(**arguments)
    load = policy.load_network

    def load_sharp() -> Any:
        torch.manual_seed(seed)
        network: Any = sharpen(load(), sharp)
        return network.double() if double else network

    policy.load_network = load_sharp  # type: ignore[method-assign]
    if prepare is not None:
        prepare(policy)
    policy.build(device=torch.device("cpu"), reference=reference)
    return policy


def sharpen(network: Any, factor: float) -> Any:
    """Scale the matrices of a network, and draw its biases, so that each of them matters."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(factor)
            else:
                weight.add_(0.1 * torch.randn(weight.shape))
    return network


def with_copies(rollout: Rollout, copies: int = 2, *, seed: int = 0) -> Rollout:
    """Return a rollout of which each copy hides random response tokens and weighs some of them.

    The response fills the canvas, as that of a masked policy does.
    """
    g, (B, T) = seeded(seed), rollout.response_mask_BT.shape
    hidden_BCT = torch.rand(B, copies, T, generator=g) < 0.6
    hidden_BCT[:, :, 0] = True
    weights_BCT = torch.rand(B, copies, T, generator=g) * (
        hidden_BCT & (torch.rand(B, copies, T, generator=g) < 0.8)
    )
    prompt_BCS = torch.zeros(B, copies, rollout.prompt_length, dtype=torch.bool)
    attention_BL = rollout.attention_mask_BL.clone()
    attention_BL[:, rollout.prompt_length :] = True
    fields: dict[str, Any] = {}
    if rollout.support_BTK is not None:
        slots_BTK = rollout.support_mask_BTK
        fields["support_mask_BTK"] = (rollout.support_BTK != PAD) & (
            torch.tensor(True) if slots_BTK is None else slots_BTK
        )
        fields["support_BTK"] = past_mask(rollout.support_BTK)
    return replace(
        rollout,
        tokens_BL=torch.cat(
            [
                past_mask(rollout.tokens_BL[:, : rollout.prompt_length]),
                past_mask(rollout.responses_BT.masked_fill(rollout.responses_BT == PAD, END)),
            ],
            1,
        ),
        attention_mask_BL=attention_BL,
        hidden_BCL=torch.cat([prompt_BCS, hidden_BCT], 2),
        copy_weights_BCT=weights_BCT,
        **fields,
    )


def past_mask(ids: Tensor) -> Tensor:
    """Renumber the ids of `TinyPolicy` as `TinyMaskedPolicy` does, so that none is MASK."""
    return ids + (ids >= MASK).to(ids.dtype)


def masked_rollout(
    prompts: Sequence[int] = (5, 7),
    responses: Sequence[int] = (6, 2, 6, 6),
    copies: int = 2,
    **options: Any,
) -> Rollout:
    """Return random rows with noised copies; arguments are those of `make_rollout`."""
    return with_copies(make_rollout(list(prompts), list(responses), **options), copies)


def naive_score(
    policy: MaskedPolicy, rollout: Rollout, *, temperature: float = 1.0, network: Any = None
) -> tuple[Tensor, Tensor]:
    """Score token by token from the logits of the network, one unpadded row and copy at a time."""
    network = policy.network if network is None else network
    S, (B, T) = rollout.prompt_length, rollout.response_mask_BT.shape
    logprobs_BT = torch.zeros(B, T, dtype=torch.float64)
    entropy_BT, count_BT = torch.zeros_like(logprobs_BT), torch.zeros_like(logprobs_BT)
    for b in range(B):
        inside = rollout.attention_mask_BL[b]
        start = S - int(inside[:S].sum())
        for c in range(rollout.hidden_BCL.shape[1]):
            ids = rollout.tokens_BL[b].masked_fill(rollout.hidden_BCL[b, c], policy.mask_id)
            logits_LV = logits_of(policy, network, ids[start:])
            for t in range(T):
                weight = float(rollout.copy_weights_BCT[b, c, t])
                if not rollout.response_mask_BT[b, t] or not weight:
                    continue
                logits_V = logits_LV[S - start + t].double() / temperature
                logits_V[list(policy.barred)] = -torch.inf
                if rollout.support_BTK is not None:
                    outside = torch.ones(len(logits_V), dtype=torch.bool)
                    support = rollout.support_BTK[b, t].long()
                    if rollout.support_mask_BTK is not None:
                        support = support[rollout.support_mask_BTK[b, t]]
                    outside[support] = False
                    logits_V[outside] = -torch.inf
                table_V = logits_V.log_softmax(0)
                logprobs_BT[b, t] += weight * table_V[rollout.responses_BT[b, t]].item()
                held = table_V > -torch.inf
                entropy_BT[b, t] -= (table_V.exp() * table_V)[held].sum().item()
                count_BT[b, t] += 1
    return logprobs_BT, entropy_BT / count_BT.clamp(min=1)


@torch.no_grad()
def logits_of(policy: MaskedPolicy, network: Any, ids_L: Tensor) -> Tensor:
    """Return the logits of a row that predict the token at each position."""
    full = {}
    if network.config.model_type == "llama":
        full["attention_mask"] = torch.ones(1, 1, len(ids_L), len(ids_L), dtype=torch.bool)
    logits_LV = network(input_ids=ids_L[None], **full).logits[0]
    return torch.cat([logits_LV[:1], logits_LV[:-1]]) if policy.shift else logits_LV


def all_hidden(rollout: Rollout) -> Rollout:
    """Return a rollout with one copy that hides the response and weighs its tokens with 1."""
    mask_BT = rollout.response_mask_BT
    prompt_BS = torch.zeros(len(mask_BT), rollout.prompt_length, dtype=torch.bool)
    return replace(
        rollout,
        hidden_BCL=torch.cat([prompt_BS, mask_BT], 1)[:, None],
        copy_weights_BCT=mask_BT[:, None].float(),
    )
