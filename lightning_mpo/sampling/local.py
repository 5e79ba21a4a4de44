"""Sampling in process, on the policy's own weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional.supports import candidates as most_probable
from lightning_mpo.objective.supports import Support
from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.sampling.base import Progress, Sampler, SamplingRequest, decode
from lightning_mpo.types import Finish, PromptBatch, Rollout


@dataclass
class _Record:
    """What is written down per step, by row and position."""

    tokens_BT: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    kept_mass_BT: Tensor
    finish_B: Tensor
    support_BTK: Tensor | None = None
    support_mask_BTK: Tensor | None = None
    candidates_BTK: Tensor | None = None
    candidate_logprobs_BTK: Tensor | None = None

    def write(self, t: int, rows: Tensor, running: Tensor, drawn: _Drawn) -> None:
        """Write down one step of the running rows."""
        self.tokens_BT[rows, t] = drawn.tokens_B[running]
        self.mask_BT[rows, t] = True
        self.logprobs_BT[rows, t] = drawn.logprobs_B[running]
        self.kept_mass_BT[rows, t] = drawn.kept_mass_B[running]
        for name in ("support", "support_mask", "candidates", "candidate_logprobs"):
            values_BK, place = getattr(drawn, f"{name}_BK"), f"{name}_BTK"
            if values_BK is None:
                continue
            if getattr(self, place) is None:
                empty = -torch.inf if values_BK.is_floating_point() else 0
                shape = (*self.tokens_BT.shape, values_BK.shape[1])
                setattr(self, place, values_BK.new_full(shape, empty))
            getattr(self, place)[rows, t] = values_BK[running]


@dataclass(frozen=True)
class _Drawn:
    """What one step drew, by row, and from what."""

    tokens_B: Tensor
    logprobs_B: Tensor
    kept_mass_B: Tensor
    support_BK: Tensor | None = None
    support_mask_BK: Tensor | None = None
    candidates_BK: Tensor | None = None
    candidate_logprobs_BK: Tensor | None = None


class LocalSampler(Sampler):
    """A loop on transformers' KV cache.

    The completions of a prompt share its prefill, rows that finished leave the batch, and one uniform number per
    (row, position) is drawn up front, so that a row's tokens do not depend on when other rows end.

    Args:
        batch_size: rows that are decoded together; None decodes all at once.
    """

    records_candidates: ClassVar[bool] = True

    def __init__(self, batch_size: int | None = None) -> None:
        at_least("LocalSampler", 1, batch_size=batch_size)
        self.batch_size = batch_size

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
        if not isinstance(policy, CausalPolicy):
            raise UserError(
                f"`LocalSampler` decodes with the KV cache of a causal model, which {type(policy).__name__} has not: give "
                "`rollout.sampler` a sampler of that policy"
            )
        P, G = len(prompts), completions
        uniform_BT = torch.rand(P * G, request.max_new_tokens, generator=generator)
        size = max(1, (self.batch_size or P * G) // G)
        step = _Step(request.support, request.temperature, request.greedy, request.candidates)
        records = []
        with rollout_mode(policy):
            for start in range(0, P, size):
                stop = min(start + size, P)
                ids_PS = prompts.input_ids_PS[start:stop].to(policy.device)
                mask_PS = prompts.attention_mask_PS[start:stop].to(policy.device)
                uniform = uniform_BT[start * G : stop * G].to(policy.device)
                records.append(_decode(policy, ids_PS, mask_PS, G, uniform, step, progress))
        if any(bool(record.logprobs_BT.isnan().any()) for record in records):
            raise UserError(
                "the policy gives no probabilities, only nan: its weights are nan or infinite, or too large for the precision "
                "of the run; take another checkpoint or model"
            )
        return _assemble(policy, prompts, G, records)


@dataclass(frozen=True)
class _Step:
    """Logits to a token, its log-prob and the support it was drawn from."""

    support: Support
    temperature: float
    greedy: bool
    candidates: int = 0

    def draw(self, logits_BV: Tensor, ranking_BV: Tensor, uniform_B: Tensor) -> _Drawn:
        same = ranking_BV is logits_BV
        logits_BV = logits_BV / self.temperature if self.temperature != 1.0 else logits_BV
        support_BK, slots_BK = self.support.select(
            logits_BV if same else ranking_BV / self.temperature
        )
        total_B = logits_BV.logsumexp(-1)
        if support_BK is None:
            choices_BK = logits_BV
        else:
            choices_BK = logits_BV.gather(1, support_BK.long())
            if slots_BK is not None:
                choices_BK = choices_BK.masked_fill(~slots_BK, -torch.inf)
        kept_B = total_B if support_BK is None else choices_BK.logsumexp(-1)
        slot_B = (
            choices_BK.argmax(-1) if self.greedy else _inverse_cdf(choices_BK, kept_B, uniform_B)
        )
        logprobs_B = choices_BK.gather(1, slot_B[:, None])[:, 0] - kept_B
        tokens_B = (
            slot_B if support_BK is None else support_BK.gather(1, slot_B[:, None])[:, 0].long()
        )
        drawn = _Drawn(tokens_B, logprobs_B, (kept_B - total_B).exp(), _int32(support_BK), slots_BK)
        if not self.candidates:
            return drawn
        ids_BK, found_BK = most_probable(choices_BK, slot_B, self.candidates, drawn.support_BK)
        return replace(
            drawn, candidates_BK=ids_BK, candidate_logprobs_BK=(found_BK - kept_B[:, None]).float()
        )


def _int32(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.int()


def _inverse_cdf(logits_BK: Tensor, total_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw an index per row: the first whose cumulative probability exceeds the uniform number."""
    cumulative_BK = (logits_BK - total_B[:, None]).exp().cumsum(-1)
    last_B = cumulative_BK[:, -1]
    target_B = torch.minimum(uniform_B * last_B, last_B * (1 - 1e-6))
    return torch.searchsorted(cumulative_BK, target_B[:, None], right=True)[:, 0].clamp(
        max=logits_BK.shape[1] - 1
    )


class _Stream:
    """One network over the running rows, with its KV cache: the policy, or the reference that ranks its tokens."""

    def __init__(
        self, policy: CausalPolicy, ids_PS: Tensor, mask_PS: Tensor, G: int, reference: bool = False
    ) -> None:
        from lightning_mpo.sampling.cache import growing_cache

        self.policy, self.reference, self.cache = policy, reference, growing_cache()
        positions_PS = (mask_PS.long().cumsum(1) - 1).clamp(min=0)
        self.logits_BV = self._run(ids_PS, mask_PS.long(), positions_PS).repeat_interleave(G, 0)
        if G > 1:
            self.cache.batch_repeat_interleave(G)

    def step(self, tokens_B: Tensor, seen_BL: Tensor, position_B: Tensor) -> None:
        """Take the tokens that were drawn."""
        self.logits_BV = self._run(tokens_B[:, None], seen_BL, position_B[:, None])

    def keep(self, index: Tensor) -> None:
        """Go on with these rows."""
        self.cache.batch_select_indices(index)

    def _run(self, ids_BL: Tensor, seen_BL: Tensor, positions_BL: Tensor) -> Tensor:
        with self.policy.as_reference(self.reference):
            hidden_BD = self.policy.decoder(self.reference)(
                input_ids=ids_BL,
                attention_mask=seen_BL,
                position_ids=positions_BL,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            return self.policy.logits(hidden_BD, self.reference)


def _decode(
    policy: CausalPolicy,
    ids_PS: Tensor,
    mask_PS: Tensor,
    G: int,
    uniform_BT: Tensor,
    step: _Step,
    progress: Progress | None,
) -> _Record:
    """Sample one batch of prompts to the end."""
    device = ids_PS.device
    S, (B, T) = ids_PS.shape[1], uniform_BT.shape
    ends = torch.tensor(policy.end_tokens, device=device)
    streams = [_Stream(policy, ids_PS, mask_PS, G)]
    if step.support.from_reference:
        streams.append(_Stream(policy, ids_PS, mask_PS, G, reference=True))
    seen_BL = torch.ones(B, S + T, dtype=torch.long, device=device)
    seen_BL[:, :S] = mask_PS.repeat_interleave(G, 0)
    position_B = mask_PS.sum(1).repeat_interleave(G, 0)
    record = _Record(
        tokens_BT=torch.zeros(B, T, dtype=torch.long, device=device),
        mask_BT=torch.zeros(B, T, dtype=torch.bool, device=device),
        logprobs_BT=torch.zeros(B, T, device=device),
        kept_mass_BT=torch.ones(B, T, device=device),
        finish_B=torch.full((B,), int(Finish.LENGTH), device=device),
    )
    rows = torch.arange(B, device=device)  # rows of the record that the cache still holds
    running = torch.ones(B, dtype=torch.bool, device=device)  # by position in `rows`
    for t in range(T):
        found = step.draw(streams[0].logits_BV, streams[-1].logits_BV, uniform_BT[rows, t])
        record.write(t, rows[running], running, found)
        tokens_B = found.tokens_B
        ended = torch.isin(tokens_B, ends)
        record.finish_B[rows[running & ended]] = int(Finish.STOP)
        drawn = int(running.sum())
        running = running & ~ended
        left = int(running.sum())
        if progress is not None:
            progress(drawn, left)
        if left == 0 or t == T - 1:
            break
        if left <= len(rows) - max(
            1, len(rows) // 8
        ):  # rows leave in lots: selecting copies the cache
            keep = running.nonzero()[:, 0]
            for stream in streams:
                stream.keep(keep)
            rows, running, tokens_B = rows[keep], running[keep], tokens_B[keep]
        for stream in streams:
            stream.step(tokens_B, seen_BL[rows, : S + t + 1], position_B[rows] + t)
    return record


def _assemble(
    policy: CausalPolicy, prompts: PromptBatch, G: int, records: list[_Record]
) -> Rollout:
    """Join batches and cut columns that no response reached."""
    mask_BT = torch.cat([record.mask_BT for record in records])
    T = max(1, int(mask_BT.sum(1).max()))

    def join(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else torch.cat(parts)[:, :T]

    tokens_BT, mask_BT, device = join("tokens_BT"), mask_BT[:, :T], mask_BT.device
    ids_BS = prompts.input_ids_PS.to(device).repeat_interleave(G, 0)
    prompt_mask_BS = prompts.attention_mask_PS.to(device).repeat_interleave(G, 0)
    kept_mass_BT, support_BTK = join("kept_mass_BT"), join("support_BTK")
    return Rollout(
        tokens_BL=torch.cat([ids_BS, tokens_BT], 1),  # type: ignore[list-item]
        attention_mask_BL=torch.cat([prompt_mask_BS, mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=torch.arange(len(prompts), device=device).repeat_interleave(G),
        behaviour_logprobs_BT=join("logprobs_BT"),  # type: ignore[arg-type]
        finish_B=torch.cat([record.finish_B for record in records]),
        support_BTK=support_BTK,
        support_mask_BTK=join("support_mask_BTK"),
        kept_mass_BT=None if support_BTK is None else kept_mass_BT,
        candidates_BTK=join("candidates_BTK"),
        candidate_logprobs_BTK=join("candidate_logprobs_BTK"),
        texts=decode(policy, tokens_BT, mask_BT),  # type: ignore[arg-type]
        rows=tuple(row for row in prompts.rows for _ in range(G)),
    )
