"""From a prompt row to the tokens of its prompt: the only place that applies chat templates."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_mpo.data.encoding import (
    TextEncoder,
    name_of,
    no_template,
    strings,
    template_of,
    without_pattern,
)
from lightning_mpo.data.limits import TimeLimitError, first_failure, time_limit
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = "<think>"
"""Text that opens a thought; a rendered prompt may end with it."""
RENDER_SECONDS = 20.0
"""Seconds that the rendering of one row may take."""
TRIED = 1000
"""Rows that are first rendered in a child process, with limits."""
HUGE = 10**9
"""Stands for the count of tokens of a text that is too long to encode."""
SYSTEM = ("system", "developer")
"""Roles of a message that comes before all turns."""

Messages = list[dict[str, Any]]


class Renderer:
    """Renders rows for one tokenizer.

    Args:
        tokenizer: of the policy.
        chat_template: apply the tokenizer's chat template.
        instruction: text before each prompt.
        suffix: text after each prompt.
        system: the system message of rows that have none.
        template_arguments: variables for the chat template.
        control_tokens: encode control tokens in rows as control tokens.
        shots: rows that are written before each prompt, each with its solution: as turns of a chat,
            or as text.

    Raises:
        UserError: an option needs a chat template and there is none, or the template does not read
            an argument.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool,
        instruction: str = "",
        suffix: str = "",
        system: str = "",
        template_arguments: Mapping[str, Any] | None = None,
        control_tokens: bool = False,
        shots: Sequence[PromptRow] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.instruction, self.suffix, self.system = instruction, suffix, system
        self.template_arguments = dict(template_arguments or {})
        self.name, self.template = name_of(tokenizer), template_of(tokenizer)
        self.encoder = TextEncoder(
            tokenizer, self.template if chat_template else "", control_tokens
        )
        self._check_options()
        self._turns = [message for shot in shots for message in self._example(shot)]
        self._examples = "".join(f"{shot.prompt}{suffix}{shot.solution}\n\n" for shot in shots)
        if shots:  # refuse unknown characters
            self.encoder.tokenize([f"{shot.prompt}{shot.solution}" for shot in shots], shots)

    def _check_options(self) -> None:
        """Refuse options that the chat template does not read."""
        # options of a template, and no template
        if self.chat_template and not self.template:
            raise UserError(
                f"the tokenizer of {self.name} has no chat template; set `data.chat_template: "
                "false` for prompts that are text"
            )
        if not self.chat_template:
            for option in ("system", "template_arguments"):
                if getattr(self, option):
                    raise UserError(
                        f"`data.{option}` is for a chat template; set `data.chat_template: true`"
                    )
        # arguments that transformers sets, or that the template does not read
        reserved = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - {
            "tools",
            "documents",
            "kwargs",
        }
        for argument in self.template_arguments:
            if argument in reserved or argument == "messages":
                raise UserError(
                    f"`data.template_arguments` cannot set `{argument}`, which is set for each row"
                )
            if argument not in ("tools", "documents") and not re.search(
                rf"\b{re.escape(argument)}\b", self.template
            ):
                raise UserError(
                    f"`data.template_arguments` sets `{argument}`, which the chat template of "
                    f"{self.name} does not read"
                )

    # --- one row ----------------------------------------------------------------------------------

    def messages(self, row: PromptRow) -> Messages:
        """Return the chat of a row, with system message, examples, instruction and suffix."""
        messages = self._row_messages(row)
        first = 1 if messages[0]["role"] in SYSTEM else 0
        return [*messages[:first], *self._turns, *messages[first:]]

    def _row_messages(self, row: PromptRow) -> Messages:
        """Return the chat of a row without examples."""
        messages = [dict(message) for message in row.messages] or [
            {"role": "user", "content": row.prompt}
        ]
        messages[-1]["content"] = f"{self.instruction}{messages[-1]['content']}{self.suffix}"
        if self.system and messages[0]["role"] not in SYSTEM:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _example(self, shot: PromptRow) -> Messages:
        """Return the turns of an example."""
        turns = [turn for turn in self._row_messages(shot) if turn["role"] not in SYSTEM]
        return [*turns, {"role": "assistant", "content": shot.solution}]

    def texts(self, row: PromptRow) -> list[str]:
        """Return the texts of a row to encode, without examples: one of each message, and the opening."""
        texts = [str(message["content"]) for message in self._row_messages(row)]
        return [*texts, row.opening] if row.opening else texts

    def encode(self, row: PromptRow) -> list[int]:
        """Return the tokens of a row's prompt, and behind them those of its opening.

        The opening is encoded by itself, as a solution is: control tokens in it are control tokens.

        Raises:
            UserError: the template refuses the row, takes too long, or a text cannot be encoded.
        """
        tokens = self._encode_prompt(row)
        return tokens + self.encoder.tokenize([row.opening], [row])[0] if row.opening else tokens

    def _encode_prompt(self, row: PromptRow) -> list[int]:
        """Return the tokens of a row's prompt without its opening."""
        if row.messages and not self.chat_template:
            raise no_template(self.tokenizer, row)
        if not self.chat_template:
            text = f"{self.instruction}{self._examples}{row.prompt}{self.suffix}"
            return self.encoder.encode(text, row)
        return self._encode_chat(row)

    def thinks(self, tokens: Sequence[int]) -> bool:
        """Return whether a prompt ends by opening a thought."""
        return str(self.tokenizer.decode(list(tokens[-12:]))).rstrip().endswith(THOUGHT)

    def written_control_token(self, row: PromptRow) -> str | None:
        """Return the first control token in the texts of a row; None: there is none."""
        return self.encoder.first_control_token(strings(self.messages(row)))

    def _encode_chat(self, row: PromptRow) -> list[int]:
        """Return the tokens of a rendered chat; control tokens in its texts are encoded as text."""
        messages = self.messages(row)
        control_token = None if self.encoder.control_tokens else self.written_control_token(row)
        if control_token is None:
            return self._render(messages, row)
        if (
            "sanitize_control_tokens"
            not in inspect.signature(self.tokenizer.apply_chat_template).parameters
        ):
            raise UserError(
                f"{self.encoder.unsafe(row, control_token)} by this version of transformers"
            )
        # the same number of special tokens with and without the control tokens in the texts
        tokens = self._render(messages, row, sanitize_control_tokens=True)
        harmless = self._render(without_pattern(messages, self.encoder.control_pattern), row)
        if self.encoder.count_special(tokens) != self.encoder.count_special(harmless):
            raise UserError(self.encoder.unsafe(row, control_token))
        return tokens

    def _render(self, messages: Messages, row: PromptRow, **options: Any) -> list[int]:
        """Apply the chat template."""
        apply = partial(
            self.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True
        )
        try:
            with time_limit(RENDER_SECONDS):
                encoded: Any = apply(messages, **self.template_arguments, **options)
        except TimeLimitError as error:
            raise UserError(self._refusal(row, f"it takes over {RENDER_SECONDS:.0f} s")) from error
        except Exception as error:  # a template may raise any exception
            raise UserError(self._refusal(row, str(error) or type(error).__name__)) from error
        return list(encoded["input_ids"])

    def _refusal(self, row: PromptRow, reason: str) -> str:
        """Return the message for a row that the template cannot render."""
        sentence = " ".join(reason.split())
        names_system = "system" in sentence.lower() and not self.system
        hint = "; `data.system` gives a system message" if names_system else ""
        return (
            f"the chat template of {self.name} cannot render {describe(row)}: "
            f"{sentence[:200]}{hint}"
        )

    # --- many rows --------------------------------------------------------------------------------

    def try_template(self, rows: Sequence[PromptRow]) -> None:
        """Render rows in a child process with limits: the first 1000, and one of each role order.

        Raises:
            UserError: the template refuses a row, or takes too much time or memory.
        """
        if not self.chat_template:
            return
        shapes = {self.shape(row): row for row in reversed(rows)}
        tried = [*rows[:TRIED], *shapes.values()]
        apply = partial(
            self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False
        )
        calls = [partial(apply, self.messages(row), **self.template_arguments) for row in tried]
        failure = first_failure(calls)
        if failure is not None:
            raise UserError(self._refusal(tried[failure[0]], failure[1]))

    def shape(self, row: PromptRow) -> tuple[str, ...]:
        """Return the roles of a row's messages."""
        return tuple(str(message["role"]) for message in row.messages) or ("user",)

    def count_tokens(self, rows: Sequence[PromptRow], limit: int) -> list[int]:
        """Count the tokens of each row's texts, without tokens of a template.

        Args:
            rows: the rows.
            limit: longest prompt in tokens. A text with more characters than that many tokens can
                have is not encoded and counts as `HUGE`.

        Raises:
            UserError: the tokenizer does not know a character, or encodes text as control tokens.
        """
        counts: list[int] = []
        most_characters = limit * self.encoder.longest_token
        for start in range(0, len(rows), 1000):
            # encode the texts of a thousand rows at once
            chunk = rows[start : start + 1000]
            pairs = [
                (text, row)
                for row in chunk
                for text in self.texts(row)
                if len(text) <= most_characters
            ]
            texts, owners = [text for text, _ in pairs], [row for _, row in pairs]
            lists = iter(self.encoder.tokenize(texts, owners) if texts else [])
            # add up the tokens of each row
            for row in chunk:
                count = 0
                for text in self.texts(row):
                    if len(text) > most_characters:
                        count += HUGE
                        continue
                    tokens = next(lists)
                    count += len(tokens)
                    if self.encoder.normalises_to_control(text, tokens, row):
                        raise UserError(
                            f"{describe(row)} becomes a control token by the tokenizer's "
                            "normalisation; change it, or set `data.control_tokens: true` if it is "
                            "meant"
                        )
                counts.append(count)
        return counts

    def rendered_already(self, rows: Sequence[PromptRow]) -> str | None:
        """Return the control token that begins all prompts, as in rendered ones; None: no token."""
        first = rows and self.encoder.control_pattern.match(self.texts(rows[0])[0])
        if not first or first[0] == self.tokenizer.eos_token:
            return None
        if first[0] != self.tokenizer.bos_token and first[0] not in self.template:
            return None
        return first[0] if all(self.texts(row)[0].startswith(first[0]) for row in rows) else None
