"""Sampling in process, on the policy's own weights and KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.sampling.barring import bar_tokens
from lightning_mpo.sampling.base import Progress, Sampler, SamplingRequest
from lightning_mpo.sampling.drawing import Step, check_probabilities
from lightning_mpo.sampling.prefix import SharedPrefix, sees_all, shared_prefix
from lightning_mpo.sampling.record import Record, assemble
from lightning_mpo.types import Finish, PromptBatch, Rollout


class LocalSampler(Sampler):
    """A loop on transformers' KV cache.

    The completions of a prompt share its prefill, prompts that begin alike share that of their
    beginning, and rows that finished leave the batch. Uniform
    numbers are drawn up front for each row and position. The tokens of a row therefore do not
    depend on when other rows end.

    Args:
        batch_size: rows that are decoded together; None decodes all at once.
        ignore_end_tokens: sample each response to its longest length, as measurements of speed and
            memory do.
    """

    records_candidates = True
    stops = True

    def __init__(self, batch_size: int | None = None, ignore_end_tokens: bool = False) -> None:
        at_least("LocalSampler", 1, batch_size=batch_size)
        self.batch_size, self.ignore_end_tokens = batch_size, ignore_end_tokens

    def check_policy(self, policy: Policy) -> None:
        if policy.masked:
            raise UserError(
                "`LocalSampler` (`rollout.sampler: null`) decodes a causal model from left to "
                f"right, and {type(policy).__name__} reveals tokens in any order: use "
                "`rollout.sampler: {class_path: DiffusionSampler, init_args: {block: 8}}`"
            )
        if not isinstance(policy, CausalPolicy):
            raise UserError(
                "`LocalSampler` decodes with the KV cache of a causal model, which "
                f"{type(policy).__name__} has not: give `rollout.sampler` a sampler of that policy"
            )

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
        self.check_policy(policy)
        assert isinstance(policy, CausalPolicy)
        bar_tokens(policy, request.support)
        # one uniform number for each token, whatever the batches
        P, G = len(prompts), completions
        uniform_BT = torch.rand(P * G, request.max_new_tokens, generator=generator)
        size = max(1, (self.batch_size or P * G) // G)
        support = request.support.resolved(lambda: policy.token_texts)
        step = Step(support, request.temperature, request.greedy, request.candidates)
        records = []
        with rollout_mode(policy):
            for start in range(0, P, size):
                stop = min(start + size, P)
                ids_PS = prompts.input_ids_PS[start:stop].to(policy.device)
                mask_PS = prompts.attention_mask_PS[start:stop].to(policy.device)
                uniform = uniform_BT[start * G : stop * G].to(policy.device)
                ends = [] if self.ignore_end_tokens else [*policy.end_tokens, *request.stop]
                records.append(_decode(policy, ids_PS, mask_PS, uniform, step, ends, progress))
        # a rollout of all batches
        check_probabilities([record.logprobs_BT for record in records])
        return assemble(policy, prompts, G, records)


class _Stream:
    """A network over the running rows with its KV cache: the policy, or a reference that ranks."""

    def __init__(
        self, policy: CausalPolicy, ids_PS: Tensor, mask_PS: Tensor, G: int, reference: bool = False
    ) -> None:
        from lightning_mpo.sampling.cache import growing_cache

        self.policy, self.reference, self.cache = policy, reference, growing_cache()
        whole = sees_all(policy.config.get_text_config(), policy.decoder(reference))
        shared = shared_prefix(ids_PS, mask_PS) if whole else None
        logits_PV, seen_PS = self._prefill(ids_PS, mask_PS.long(), shared)
        self.logits_BV = logits_PV.repeat_interleave(G, 0)
        self.seen_BS = seen_PS.repeat_interleave(G, 0)
        """Entries of the cache that belong to each row's prompt."""
        if G > 1:
            self.cache.batch_repeat_interleave(G)

    def _prefill(
        self, ids_PS: Tensor, mask_PS: Tensor, shared: SharedPrefix | None
    ) -> tuple[Tensor, Tensor]:
        """Read the prompts; return the next logits, and the prompt's entries of the cache."""
        if shared is None:
            positions_PS = (mask_PS.cumsum(1) - 1).clamp(min=0)
            return self._run(ids_PS, mask_PS, positions_PS), mask_PS
        # the beginning as one row, then the end of each prompt behind its part of it
        ids_1L = shared.ids_L[None]
        places_L = torch.arange(ids_1L.shape[1], device=ids_1L.device)
        self._run(ids_1L, torch.ones_like(ids_1L), places_L[None])
        self.cache.batch_repeat_interleave(len(ids_PS))
        seen_PS = shared.seen_PS
        return self._run(shared.ends_PU, seen_PS, shared.positions_PU), seen_PS

    def step(self, tokens_B: Tensor, seen_BL: Tensor, position_B: Tensor) -> None:
        """Read the drawn tokens, and compute the next logits."""
        self.logits_BV = self._run(tokens_B[:, None], seen_BL, position_B[:, None])

    def select_rows(self, index: Tensor) -> None:
        """Go on with these rows alone."""
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
    uniform_BT: Tensor,
    step: Step,
    end_tokens: list[int],
    progress: Progress | None,
) -> Record:
    """Sample one batch of prompts to the end."""
    device = ids_PS.device
    B, T = uniform_BT.shape
    G = B // len(ids_PS)
    ends = torch.tensor(end_tokens, device=device)
    # networks behind the prompts
    streams = [_Stream(policy, ids_PS, mask_PS, G)]
    if step.support.from_reference:
        streams.append(_Stream(policy, ids_PS, mask_PS, G, reference=True))
    # the mask of attention, and the position behind each prompt
    seen_BS = streams[0].seen_BS
    S = seen_BS.shape[1]
    seen_BL = torch.ones(B, S + T, dtype=torch.long, device=device)
    seen_BL[:, :S] = seen_BS
    position_B = mask_PS.sum(1).repeat_interleave(G, 0)
    record = Record.empty(B, T, device)
    rows = torch.arange(B, device=device)  # rows of the record that the cache still holds
    running = torch.ones(B, dtype=torch.bool, device=device)  # by position in `rows`
    for t in range(T):
        # one token of each running row
        drawn = step.draw(streams[0].logits_BV, streams[-1].logits_BV, uniform_BT[rows, t], t)
        record.write(t, rows[running], running, drawn)
        tokens_B = drawn.tokens_B
        # rows that end with it
        ended = torch.isin(tokens_B, ends)
        record.finish_B[rows[running & ended]] = int(Finish.STOP)
        sampled = int(running.sum())
        running = running & ~ended
        left = int(running.sum())
        if progress is not None:
            progress(sampled, left)
        if left == 0 or t == T - 1:
            break
        # ended rows leave the cache in lots, as selecting copies it
        if left <= len(rows) - max(1, len(rows) // 8):
            index = running.nonzero()[:, 0]
            for stream in streams:
                stream.select_rows(index)
            rows, running, tokens_B = rows[index], running[index], tokens_B[index]
        # the next logits
        for stream in streams:
            stream.step(tokens_B, seen_BL[rows, : S + t + 1], position_B[rows] + t)
    return record
