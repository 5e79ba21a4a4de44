"""Solutions of rows as tokens: demonstrations that a supervised stage imitates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lightning_mpo.data.limits import time_limit
from lightning_mpo.data.rendering import RENDER_SECONDS, Renderer
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import Finish, PromptBatch, PromptRow, Rollout


class SolutionEncoder:
    """Encodes the solutions of rows, each closed by the token that ends a response.

    Args:
        renderer: of the prompts.
        end_tokens: ids that end a response.
    """

    def __init__(self, renderer: Renderer, end_tokens: Sequence[int]) -> None:
        self.renderer, self.end_tokens = renderer, list(end_tokens)
        self._closing: int | None = None

    def encode(self, rows: Sequence[PromptRow], canvas: int | None = None) -> list[list[int]]:
        """Return the tokens of the rows' solutions, each with the closing token.

        Control tokens in a solution are encoded as control tokens, as the policy can write them.
        None of them may end the solution early.

        Args:
            rows: the rows.
            canvas: tokens of each solution, which the closing token fills up. None: solutions keep
                their lengths.

        Raises:
            UserError: a row has no solution, or one with an end token or unknown characters, or one
                that is longer than the canvas.
        """
        # the texts
        texts: list[str] = []
        for row in rows:
            if row.solution is None:
                raise UserError(
                    f"{describe(row)} has no solution to imitate; give the data a solution column"
                )
            if not row.solution.strip():
                raise UserError(
                    f"the solution of {describe(row)} is empty; a demonstration needs something to "
                    "imitate"
                )
            texts.append(row.solution)
        if not rows:
            return []
        # the tokens, none of which ends a response
        closing = self.closing_token(rows[0])
        encoded = self.renderer.encoder.tokenize(texts, rows)
        for row, tokens in zip(rows, encoded, strict=True):
            early = next((token for token in tokens if token in {closing, *self.end_tokens}), None)
            if early is not None:
                text = self.renderer.tokenizer.convert_ids_to_tokens(early)
                raise UserError(
                    f"the solution of {describe(row)} holds the end token {text!r}; leave it out, "
                    "it is added"
                )
        solutions = [[*tokens, closing] for tokens in encoded]
        return solutions if canvas is None else on_canvas(rows, solutions, canvas)

    def closing_token(self, row: PromptRow) -> int:
        """Return the token that ends a response.

        It is the end token that the template writes after a message of the assistant, else the end
        of sequence.

        Args:
            row: a row to render; it is rendered once.

        Raises:
            UserError: there is no end token.
        """
        if self._closing is None:
            token = self._closing_of_template(row) if self.renderer.chat_template else None
            self._closing = self._closing_of_tokenizer() if token is None else token
        return self._closing

    def _closing_of_template(self, row: PromptRow) -> int | None:
        """Return the first end token that the template writes after an answer; None: no token."""
        if not self.end_tokens:
            return None
        renderer, mark = self.renderer, "ANSWER"
        # render the prompt, and the prompt with an answer
        messages = [*renderer.messages(row), {"role": "assistant", "content": mark}]
        try:
            with time_limit(RENDER_SECONDS):
                apply: Any = partial(
                    renderer.tokenizer.apply_chat_template,
                    tokenize=False,
                    **renderer.template_arguments,
                )
                before = str(apply(renderer.messages(row), add_generation_prompt=True))
                text = str(apply(messages))
        except Exception:  # the template takes no message of the assistant
            text = before = ""
        # the text behind the answer
        tail = text[len(before) :] if text.startswith(before) else text.rpartition(mark)[2]
        tokens = list(
            renderer.tokenizer(tail.removeprefix(mark), add_special_tokens=False)["input_ids"]
        )
        return next((int(token) for token in tokens if token in self.end_tokens), None)

    def _closing_of_tokenizer(self) -> int:
        """Return the end of sequence, or else the first end token."""
        eos = self.renderer.tokenizer.eos_token_id
        if eos is not None:
            return int(eos)
        if self.end_tokens:
            return self.end_tokens[0]
        raise UserError(
            f"the tokenizer of {self.renderer.name} has no token that ends a response, which a "
            "demonstration needs; give it an `eos_token`"
        )


def on_canvas(
    rows: Sequence[PromptRow], solutions: Sequence[list[int]], canvas: int
) -> list[list[int]]:
    """Fill solutions up to a number of tokens, with their last token.

    Args:
        rows: the rows, for messages.
        solutions: token ids of their solutions, with the closing token.
        canvas: number of tokens.

    Raises:
        UserError: a solution is longer than the canvas.
    """
    for row, solution in zip(rows, solutions, strict=True):
        if len(solution) > canvas:
            raise UserError(
                f"the solution of {describe(row)} has {len(solution)} tokens with the end token, "
                f"more than the canvas of {canvas}: raise `likelihood.canvas`, or drop the row"
            )
    return [[*solution, *solution[-1:] * (canvas - len(solution))] for solution in solutions]


def check_positions(
    rows: Sequence[PromptRow],
    solutions: Sequence[Sequence[int]],
    room: int,
    positions: int,
    encode: Callable[[Sequence[PromptRow]], PromptBatch],
) -> None:
    """Refuse rows whose prompt and solution are together longer than the model can read.

    Args:
        rows: the rows.
        solutions: token ids of their solutions, with the closing token.
        room: longest solution that fits behind the longest prompt, tokens.
        positions: longest sequence that the model can read, tokens.
        encode: tokenises prompts; called for rows whose solution is longer than `room`.

    Raises:
        UserError: a row is too long.
    """
    for row, solution in zip(rows, solutions, strict=True):
        if len(solution) <= room:
            continue
        length = int(encode([row]).attention_mask_PS.sum())
        if length + len(solution) > positions:
            raise UserError(
                f"{describe(row)} has {length} tokens and its solution {len(solution)}, together "
                f"more than the model's {positions} positions: shorten or drop the row"
            )


def rollout_of(prompts: PromptBatch, solutions: Sequence[Sequence[int]]) -> Rollout:
    """Return solutions as a rollout, as if the policy had sampled them.

    Args:
        prompts: B prompts.
        solutions: tokens of the solution of each prompt.
    """
    B, T = len(solutions), max(len(tokens) for tokens in solutions)
    tokens_BT = torch.zeros(B, T, dtype=torch.long)
    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    for i, tokens in enumerate(solutions):
        tokens_BT[i, : len(tokens)], mask_BT[i, : len(tokens)] = torch.tensor(tokens), True
    return Rollout(
        tokens_BL=torch.cat([prompts.input_ids_PS, tokens_BT], 1),
        attention_mask_BL=torch.cat([prompts.attention_mask_PS, mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=torch.arange(B),
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.full((B,), int(Finish.STOP)),
        rows=prompts.rows,
    )
