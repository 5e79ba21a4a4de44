"""A policy that is a table of bigrams, with a sampler of its own: what the package asks of a policy, and nothing else."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_mpo.policies.base import Policy
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Finish, Rollout
from tests.support.builders import END, VOCABULARY, seeded


class Letters:
    """A tokenizer of one letter a token."""

    bos_token_id, eos_token_id, pad_token_id = None, END, 0

    def batch_decode(self, rows, skip_special_tokens=False):
        return ["".join(chr(97 + token) for token in row) for row in rows]


class BigramPolicy(Policy):
    """`log p(v | u) = log_softmax(W[u])`, over a stored support where there is one."""

    vocabulary, end_tokens, tokenizer = VOCABULARY, [END], Letters()

    def __init__(self, sharp: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(sharp * torch.randn(VOCABULARY, VOCABULARY, generator=seeded(0)))
        self.register_buffer("initial", self.table.detach().clone())

    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        pass

    def build(self, *, device: torch.device, reference: bool) -> None:
        self.to(device)

    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def score(self, rollout, mask_BT, *, temperature, request=None, reference=False) -> TokenScores:
        T, table = rollout.response_mask_BT.shape[1], self.initial if reference else self.table
        logits_BTV = table[rollout.tokens_BL[:, -T - 1 : -1]] / temperature
        inside_BTV = support_mask(rollout)
        if inside_BTV is not None:
            logits_BTV = logits_BTV.masked_fill(~inside_BTV, -torch.inf)
        all_BTV = logits_BTV.log_softmax(-1)
        entropy_BT = -(all_BTV.exp() * all_BTV.masked_fill(all_BTV == -torch.inf, 0)).sum(-1)
        logprobs_BT = all_BTV.gather(2, rollout.responses_BT[..., None])[..., 0].masked_fill(
            ~mask_BT, 0
        )
        return TokenScores(
            logprobs_BT, entropy_BT.masked_fill(~mask_BT, 0), on_support=inside_BTV is not None
        )


def support_mask(rollout: Rollout) -> Tensor | None:
    """Return which ids the stored supports hold, `[B, T, V]`; positions without a response token hold all."""
    if rollout.support_BTK is None:
        return None
    support_mask_BTK = rollout.support_mask_BTK
    held_BTK = (
        torch.ones_like(rollout.support_BTK, dtype=torch.bool)
        if support_mask_BTK is None
        else support_mask_BTK
    )
    B, T, _ = held_BTK.shape
    counts = torch.zeros(B, T, VOCABULARY).scatter_add(
        2, rollout.support_BTK.long(), held_BTK.float()
    )
    whole_BT1 = ~held_BTK.any(-1, keepdim=True)  # no id is stored: the whole vocabulary
    return (counts > 0) | whole_BT1 | ~rollout.response_mask_BT[..., None]


class BigramSampler(Sampler):
    """Draws token by token from the table."""

    records_candidates: ClassVar[bool] = False

    def sample(self, policy, prompts, completions, request, *, generator, progress=None) -> Rollout:
        ids = prompts.input_ids_PS.repeat_interleave(completions, 0)
        prompt_mask = prompts.attention_mask_PS.repeat_interleave(completions, 0)
        B, T, running = len(ids), request.max_new_tokens, torch.ones(len(ids), dtype=torch.bool)
        columns: dict[str, list[Tensor]] = {
            name: [] for name in ("token", "mask", "logprob", "kept", "support", "slots")
        }
        support = request.support.resolved(lambda: policy.token_texts)
        for t in range(T):
            logits_BV = policy.table.detach()[ids[:, -1]] / request.temperature
            support_BK, support_mask_BK = support.at(t).select(logits_BV)
            inside_BV = torch.ones_like(logits_BV, dtype=torch.bool)
            if support.by_step:
                empty = torch.zeros(B, support.slots, dtype=torch.int32)
                size = 0 if support_BK is None else support_BK.shape[1]
                columns["slots"].append((torch.arange(support.slots) < size).expand(B, -1))
                if support_BK is not None:
                    empty[:, :size] = support_BK
                columns["support"].append(empty)
            if support_BK is not None:
                held = (
                    torch.ones_like(support_BK, dtype=torch.bool)
                    if support_mask_BK is None
                    else support_mask_BK
                )
                inside_BV = (
                    torch.zeros_like(logits_BV).scatter_add(1, support_BK.long(), held.float()) > 0
                )
                if not support.by_step:
                    columns["support"].append(support_BK.int())
                    columns["slots"].append(held)
            logprobs_BV = logits_BV.masked_fill(~inside_BV, -torch.inf).log_softmax(-1)
            drawn_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)[:, 0]
            token_B = logprobs_BV.argmax(-1) if request.greedy else drawn_B
            columns["token"].append(token_B.masked_fill(~running, 0))
            columns["mask"].append(running)
            columns["logprob"].append(
                logprobs_BV.gather(1, token_B[:, None])[:, 0].masked_fill(~running, 0)
            )
            columns["kept"].append((logits_BV.softmax(-1) * inside_BV).sum(-1))
            ids = torch.cat([ids, token_B[:, None]], 1)
            if progress is not None:
                progress(int(running.sum()), int((running & (token_B != END)).sum()))
            running = running & (token_B != END)
        mask_BT = torch.stack(columns["mask"], 1)
        tokens_BL = torch.cat(
            [
                prompts.input_ids_PS.repeat_interleave(completions, 0),
                torch.stack(columns["token"], 1),
            ],
            1,
        )
        rows = [row[mask].tolist() for row, mask in zip(tokens_BL[:, -T:], mask_BT, strict=True)]
        truncated = columns["support"] != []
        return Rollout(
            tokens_BL=tokens_BL,
            attention_mask_BL=torch.cat([prompt_mask, mask_BT], 1),
            response_mask_BT=mask_BT,
            group_B=torch.arange(B) // completions,
            behaviour_logprobs_BT=torch.stack(columns["logprob"], 1),
            finish_B=torch.where(running, int(Finish.LENGTH), int(Finish.STOP)),
            support_BTK=torch.stack(columns["support"], 1) if truncated else None,
            support_mask_BTK=torch.stack(columns["slots"], 1) if truncated else None,
            kept_mass_BT=torch.stack(columns["kept"], 1) if truncated else None,
            texts=tuple(
                policy.tokenizer.batch_decode([[t for t in row if t != END] for row in rows])
            ),
            rows=tuple(row for row in prompts.rows for _ in range(completions)),
        )
