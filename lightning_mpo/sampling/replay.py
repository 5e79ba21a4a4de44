"""Replay from inner positions: some completions restart inside others, so late tokens branch."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.checks import within
from lightning_mpo.errors import UserError
from lightning_mpo.objective.advantages import Advantage, PrefixTree
from lightning_mpo.policies.base import Policy
from lightning_mpo.sampling.base import Progress, Sampler, SamplingRequest, decode
from lightning_mpo.types import Finish, PromptBatch, Rollout, take_rows


class PrefixReplay:
    """Samples some completions from the prompt, and the others from positions within these.

    Completions sampled from the prompt part early, and a prefix tree gives late tokens no credit
    then. The paper of T-SPMO has such a variant [REC]; the rule is ours [I] (docs/algorithms.md
    4.8): source and position are uniform, and copied tokens keep the log-probs and supports that
    were recorded, token in, token out. At branches above a restart the copied child counts with its
    copies in the means, as it does in the sample.

    Args:
        share: of the completions of a prompt that restart, in (0, 1); `ceil((1 - share)·G)` are
            sampled from the prompt.
    """

    def __init__(self, share: float = 0.5) -> None:
        within("PrefixReplay", "(0, 1)", share=share)
        self.share = share

    def check(self, completions: int, advantage: Advantage) -> None:
        """Refuse an advantage that counts copied tokens again, and groups without a restart."""
        name = type(advantage).__name__
        if not isinstance(advantage, PrefixTree) or advantage.count:
            name += ".count: true" if isinstance(advantage, PrefixTree) else ""
            raise UserError(
                f"`PrefixReplay` copies the first tokens of other completions, which `{name}` "
                "would count again; use `advantage: PrefixTree` with `count: false`, or "
                "`rollout.replay: null`"
            )
        if self.fresh(completions) == completions:
            raise UserError(
                f"`PrefixReplay.share` ({self.share}) restarts none of {completions} completions; "
                "raise it or `rollout.completions`"
            )

    def fresh(self, completions: int) -> int:
        """Return the number of completions that are sampled from the prompt."""
        return math.ceil((1 - self.share) * completions - 1e-9)

    def sample(
        self,
        sampler: Sampler,
        policy: Policy,
        prompts: PromptBatch,
        completions: int,
        request: SamplingRequest,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Rollout:
        """Return `completions` responses per prompt; in each group the restarted ones come last.

        Args:
            sampler: draws both parts.
            policy: weights to sample from.
            prompts: P prompts.
            completions: G.
            request: how to sample; `max_new_tokens` is the longest response, the copied part
                included.
            generator: source of all randomness, on the CPU.
            progress: called after every step.
        """
        P, F = len(prompts), self.fresh(completions)
        R = completions - F
        # completions from the prompt
        first = sampler.sample(policy, prompts, F, request, generator=generator, progress=progress)
        # the completion and the position of each restart
        first_row_P1 = F * torch.arange(P)[:, None]
        source_PR = (torch.rand(P, R, generator=generator) * F).long() + first_row_P1
        source = source_PR.flatten().to(first.group_B.device)
        uniform = torch.rand(P * R, generator=generator).to(source.device)
        position = restart_positions(first.response_mask_BT.sum(1)[source], uniform)
        # continuations
        rows = tuple(row for row in prompts.rows for _ in range(R))
        again = sampler.sample(
            policy,
            prompts_up_to(take_rows(first, source), position, rows),
            1,
            replace(request, max_new_tokens=request.max_new_tokens - int(position.min())),
            generator=generator,
            progress=progress,
        )
        # rows of a group side by side
        place = torch.arange(P * completions, device=source.device) % completions
        group = torch.arange(P * completions, device=source.device) // completions
        order = torch.where(place < F, group * F + place, P * F + group * R + place - F)
        return _put_together(policy, first, again, source, position, order, request.max_new_tokens)


def restart_positions(lengths_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the number of copied tokens: uniform over 1 … length - 1; 0 of a single token.

    Example:
        >>> restart_positions(torch.tensor([4, 4, 1]), torch.tensor([0.0, 0.99, 0.5]))
        tensor([1, 3, 0])
    """
    inner_B = lengths_B - 1
    return torch.where(inner_B > 0, 1 + (uniform_B * inner_B).long().clamp(max=inner_B - 1), 0)


def prompts_up_to(rollout: Rollout, position_B: Tensor, rows: tuple[Any, ...]) -> PromptBatch:
    """Return each row's prompt with its first `position` response tokens, padded on the left."""
    S, longest = rollout.prompt_length, int(position_B.max())
    columns = torch.arange(S + longest, device=position_B.device) - (longest - position_B)[:, None]
    index, inside = columns.clamp(min=0), columns >= 0
    mask = rollout.attention_mask_BL.gather(1, index) & inside
    return PromptBatch(rollout.tokens_BL.gather(1, index).masked_fill(~mask, 0), mask, rows)


def _columns(rollout: Rollout) -> dict[str, Tensor]:
    """Return the tensors per response token by name; `tokens_BL` and its mask without prompts."""
    columns = {
        "tokens_BL": rollout.responses_BT,
        "attention_mask_BL": rollout.attention_mask_BL[:, rollout.prompt_length :],
    }
    for item in fields(Rollout):
        value = getattr(rollout, item.name)
        if isinstance(value, Tensor) and item.name.rsplit("_", 1)[-1].startswith("BT"):
            columns[item.name] = value
    return columns


def _stitch(head_BT: Tensor, tail_BT: Tensor, position_B: Tensor, width: int) -> Tensor:
    """Return `position` columns of the head and then those of the tail, 0 behind them."""
    place = torch.arange(width, device=position_B.device).expand(len(position_B), -1)
    behind = place - position_B[:, None]
    index = torch.where(behind < 0, place, head_BT.shape[1] + behind)
    joined = torch.cat([head_BT, tail_BT], 1)
    rows = torch.arange(len(joined), device=position_B.device)[:, None]
    taken = joined[rows, index.clamp(max=joined.shape[1] - 1)]
    missing = behind >= tail_BT.shape[1]
    return taken.masked_fill(missing.view(*missing.shape, *[1] * (taken.ndim - 2)), 0)


def _put_together(
    policy: Policy,
    first: Rollout,
    again: Rollout,
    source: Tensor,
    position: Tensor,
    order: Tensor,
    limit: int,
) -> Rollout:
    """Join copied prefixes with their continuations, cut at `limit`, and sort rows by group."""
    # lengths of the joined rows
    S = first.prompt_length
    length = position + again.response_mask_BT.sum(1)
    width = max(first.response_mask_BT.shape[1], int(length.clamp(max=limit).max()))
    # tensors per response token
    heads, tails = _columns(first), _columns(again)
    joined: dict[str, Any] = {}
    for name, head in heads.items():
        stitched = _stitch(head[source], tails[name], position, width)
        padded = torch.cat(
            [head, head.new_zeros(len(head), width - head.shape[1], *head.shape[2:])], 1
        )
        joined[name] = torch.cat([padded, stitched])[order]
    # prompts in front
    for name in ("tokens_BL", "attention_mask_BL"):
        prompt = getattr(first, name)[:, :S]
        joined[name] = torch.cat([torch.cat([prompt, prompt[source]])[order], joined[name]], 1)
    finish = torch.cat(
        [first.finish_B, torch.where(length > limit, int(Finish.LENGTH), again.finish_B)]
    )[order]
    rollout = Rollout(
        **joined,
        group_B=torch.cat([first.group_B, first.group_B[source]])[order],
        finish_B=finish,
        rows=tuple((first.rows + again.rows)[i] for i in order.tolist()),
    )
    return replace(rollout, texts=decode(policy, rollout.responses_BT, rollout.response_mask_BT))
