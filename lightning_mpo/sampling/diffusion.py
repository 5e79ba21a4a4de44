"""Sampling from a masked language model: a canvas of MASK is revealed in steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, one_of
from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.sampling.barring import bar_tokens
from lightning_mpo.sampling.base import Progress, Sampler, SamplingRequest
from lightning_mpo.sampling.drawing import Drawn, Step, check_probabilities
from lightning_mpo.sampling.record import Record, assemble
from lightning_mpo.types import PromptBatch, Rollout

Remasking = Literal["low_confidence", "random", "entropy"]


class MaskedModel(Protocol):
    """The members of a masked policy that this sampler uses."""

    mask_id: int
    device: torch.device

    def states(
        self, ids_BL: Tensor, attention_mask_BL: Tensor, *, reference: bool = False
    ) -> Tensor:
        """Return the states `[B, L, D]` that predict the token at each position."""

    def logits(self, hidden_BD: Tensor, reference: bool = False) -> Tensor:
        """Return float32 logits `[B, V]`; barred ids have probability 0."""


class DiffusionSampler(Sampler):
    """Reveals a canvas of `max_new_tokens` masked tokens, block by block from the left.

    Each step draws a token for every hidden position of the block and reveals some of them. The
    other positions stay hidden and are drawn anew in the next step [C, LLaDA]. A row ends early
    if a finished block of it holds end tokens alone. The end token, which no step drew, then fills
    the rest of its canvas.

    A token is the first whose cumulative probability exceeds one uniform number. A uniform float32
    number has a resolution of 2^-24, so probabilities are exact to about 1e-7. Implementations with
    Gumbel noise need float64 [C, LLaDA]: noise of low precision has a largest value, which distorts
    the tails. Each step draws a uniform number for each row, also for those that have ended, and
    each position of a block. The tokens of a row therefore depend neither on the other rows nor on
    when these end.

    Args:
        block: length of a block in tokens; must divide `rollout.max_new_tokens`.
        tokens_per_step: tokens that a step reveals in each row; must divide `block`.
        remasking: the positions that a step reveals. "low_confidence" takes the drawn tokens of the
            highest probability, at temperature 1 over the vocabulary. "entropy" takes the
            distributions of the lowest entropy. "random" takes positions at random. Of equal
            positions the leftmost is taken.
        batch_size: rows that are revealed together; None: all at once.
    """

    left_to_right = False

    def __init__(
        self,
        block: int,
        tokens_per_step: int = 1,
        remasking: Remasking = "low_confidence",
        batch_size: int | None = None,
    ) -> None:
        at_least("DiffusionSampler", 1, block=block, tokens_per_step=tokens_per_step)
        at_least("DiffusionSampler", 1, batch_size=batch_size)
        one_of("DiffusionSampler", ("low_confidence", "random", "entropy"), remasking=remasking)
        if block % tokens_per_step:
            raise UserError(
                f"`DiffusionSampler.tokens_per_step` must divide `block` ({block}), got "
                f"{tokens_per_step}: all steps of a block reveal the same number of tokens"
            )
        self.block, self.tokens_per_step = block, tokens_per_step
        self.remasking: Remasking = remasking
        self.batch_size = batch_size

    # --- checks -----------------------------------------------------------------------------------

    def check(self, candidates: int) -> None:
        if candidates:
            raise UserError(
                f"`objective.surrogate` compares {candidates} candidates of each token from left "
                "to right, which `DiffusionSampler` does not record: set `top_k: null`, or use "
                "another surrogate"
            )

    def check_policy(self, policy: Policy) -> None:
        if not policy.masked:
            raise UserError(
                "`DiffusionSampler` reveals the tokens of a masked language model, and "
                f"{type(policy).__name__} is a causal one: use `rollout.sampler: null`, or a "
                "`MaskedPolicy`"
            )

    def check_canvas(self, max_new_tokens: int) -> None:
        if max_new_tokens % self.block:
            below = max_new_tokens - max_new_tokens % self.block
            nearest = " or ".join(str(n) for n in (below, below + self.block) if n)
            raise UserError(
                f"`rollout.max_new_tokens` ({max_new_tokens}) must be a multiple of "
                f"`DiffusionSampler.block` ({self.block}), as blocks fill the canvas: use "
                f"{nearest}, or another block"
            )

    # --- sampling ---------------------------------------------------------------------------------

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
        bar_tokens(policy, request.support)
        self.check_canvas(request.max_new_tokens)
        G, T = completions, request.max_new_tokens
        model = cast(MaskedModel, policy)  # `check_policy` passed
        canvas = _Canvas.of(model, policy.end_tokens, prompts, G, T)
        step = Step(request.support, request.temperature, request.greedy, entropy=True)
        with rollout_mode(policy):
            for s in range(T // self.tokens_per_step):
                # reveal tokens of each running row, in batches
                shape, running = (len(prompts) * G, self.block), len(canvas.rows)
                numbers = _Numbers.draw(shape, generator, model.device, self.remasking)
                size = self.batch_size or running
                for start in range(0, running, size):
                    self._reveal(canvas, slice(start, start + size), s, numbers, step)
                # rows end with a block
                done = (s + 1) * self.tokens_per_step
                if done % self.block == 0:
                    canvas.drop_ended(slice(done - self.block, done))
                left = 0 if done == T else len(canvas.rows)
                if progress is not None:
                    progress(running * self.tokens_per_step, left)
                if not left:
                    break
        canvas.record.end(policy.end_tokens)
        return assemble(policy, prompts, G, [canvas.record])

    def _reveal(self, canvas: _Canvas, part: slice, s: int, numbers: _Numbers, step: Step) -> None:
        """Draw the hidden tokens of a block of some running rows, and reveal some of them."""
        first = s * self.tokens_per_step // self.block * self.block
        # n hidden positions, as many in each row
        hidden_RN = canvas.hidden_RT[part, first : first + self.block]
        row_n, column_n = hidden_RN.nonzero(as_tuple=True)
        logits_nV, ranking_nV = canvas.logits(
            part, row_n, first + column_n, reference=step.support.from_reference
        )
        total_n = logits_nV.logsumexp(-1)
        check_probabilities([total_n])
        if ranking_nV is not logits_nV:
            check_probabilities([ranking_nV.logsumexp(-1)])
        place = canvas.rows[part][row_n], column_n
        drawn = step.draw(logits_nV, ranking_nV, numbers.uniform_BN[place])
        # the positions of the highest score, the leftmost first
        if numbers.order_BN is not None:
            score_n = numbers.order_BN[place]
        elif self.remasking == "entropy":
            assert drawn.entropy_B is not None
            score_n = -drawn.entropy_B
        else:
            score_n = logits_nV.gather(1, drawn.tokens_B[:, None])[:, 0] - total_n
        score_RN = score_n.view(len(hidden_RN), -1)
        best_RN = score_RN.sort(dim=1, descending=True, stable=True).indices
        first_R1 = torch.arange(len(score_RN), device=score_n.device)[:, None] * score_RN.shape[1]
        index = (first_R1 + best_RN[:, : self.tokens_per_step]).flatten()
        canvas.write(part.start + row_n[index], first + column_n[index], index, drawn, s)


@dataclass(frozen=True)
class _Numbers:
    """Uniform numbers of one step, for all rows and the positions of a block."""

    uniform_BN: Tensor
    order_BN: Tensor | None  # of random remasking

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int],
        generator: torch.Generator,
        device: torch.device,
        remasking: Remasking,
    ) -> _Numbers:
        """Draw the numbers of a step on the CPU, and move them to a device."""
        uniform_BN = torch.rand(shape, generator=generator).to(device)
        if remasking != "random":
            return cls(uniform_BN, None)
        return cls(uniform_BN, torch.rand(shape, generator=generator).to(device))


@dataclass
class _Canvas:
    """Partly revealed rows. R of its B rows still run."""

    model: MaskedModel
    ends: list[int]
    ids_RL: Tensor
    seen_RL: Tensor
    hidden_RT: Tensor
    rows: Tensor  # numbers of the R rows in the record
    record: Record

    @classmethod
    def of(
        cls, model: MaskedModel, ends: list[int], prompts: PromptBatch, G: int, T: int
    ) -> _Canvas:
        """Return G hidden canvases behind each prompt."""
        device = model.device
        ids_BS = prompts.input_ids_PS.to(device).repeat_interleave(G, 0)
        mask_BS = prompts.attention_mask_PS.to(device).repeat_interleave(G, 0)
        shape = B, _ = len(ids_BS), T
        return cls(
            model,
            ends,
            torch.cat([ids_BS, ids_BS.new_full(shape, model.mask_id)], 1),
            torch.cat([mask_BS, mask_BS.new_ones(shape)], 1),
            torch.ones(shape, dtype=torch.bool, device=device),
            torch.arange(B, device=device),
            Record.canvas(B, T, ends[0], device),
        )

    @property
    def length(self) -> int:
        """T, tokens of a canvas."""
        return self.hidden_RT.shape[1]

    def logits(
        self, part: slice, row_n: Tensor, column_n: Tensor, reference: bool
    ) -> tuple[Tensor, Tensor]:
        """Return logits at positions of some rows, of the policy and of the model that ranks."""
        place = row_n, self.ids_RL.shape[1] - self.length + column_n
        rows = self.ids_RL[part], self.seen_RL[part]
        logits_nV = self.model.logits(self.model.states(*rows)[place])
        if not reference:
            return logits_nV, logits_nV
        states_nD = self.model.states(*rows, reference=True)[place]
        return logits_nV, self.model.logits(states_nD, reference=True)

    def write(
        self, row_n: Tensor, column_n: Tensor, index_n: Tensor, drawn: Drawn, step: int
    ) -> None:
        """Reveal tokens of a step.

        Args:
            row_n: rows among those that run.
            column_n: positions in the canvas.
            index_n: numbers of the tokens among those drawn.
            drawn: all tokens that the step drew.
            step: number of the step, from 0.
        """
        assert self.record.reveal_BT is not None
        rows = self.rows[row_n]
        self.record.write(column_n, rows, index_n, drawn)
        self.record.reveal_BT[rows, column_n] = step
        start = self.ids_RL.shape[1] - self.length
        self.ids_RL[row_n, start + column_n] = drawn.tokens_B[index_n]
        self.hidden_RT[row_n, column_n] = False

    def drop_ended(self, columns: slice) -> None:
        """Drop the rows of which the block of these columns holds end tokens alone."""
        start = self.ids_RL.shape[1] - self.length
        block_RN = self.ids_RL[:, start + columns.start : start + columns.stop]
        ends = torch.tensor(self.ends, device=block_RN.device)
        left = (~torch.isin(block_RN, ends).all(1)).nonzero()[:, 0]
        if len(left) < len(self.rows):
            self.ids_RL, self.seen_RL = self.ids_RL[left], self.seen_RL[left]
            self.hidden_RT, self.rows = self.hidden_RT[left], self.rows[left]
