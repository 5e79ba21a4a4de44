"""From a prompt row to the tokens of its prompt: the only place that renders and encodes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lightning_mpo.data.limits import TimeLimitError, first_failure, time_limit
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

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token for one byte: ordinary text, also where a tokenizer marks it as special."""
HUGE = 10**9
"""Stands for the count of tokens of a text that is too long to encode."""

Messages = list[dict[str, Any]]


def no_template(tokenizer: PreTrainedTokenizerBase, row: PromptRow) -> UserError:
    """Return the refusal of a chat to which no template is applied: the option is off, or the tokenizer has none."""
    if tokenizer.chat_template:
        return UserError(
            f"{describe(row)} is a chat, which needs a template; set `data.chat_template: true`"
        )
    return UserError(
        f"{describe(row)} is a chat, but the tokenizer of {_name(tokenizer)} has no chat template; take a model that "
        "has one, or prompts that are text"
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "the policy"


class Renderer:
    """Renders rows for one tokenizer.

    Control tokens are special tokens, and added tokens that the chat template writes. Text of rows never becomes one,
    unless `control_tokens` allows it.

    Args:
        tokenizer: of the policy.
        chat_template: apply the tokenizer's chat template.
        instruction: text before each prompt.
        suffix: text after each prompt.
        system: the system message of rows that have none.
        template_arguments: variables for the chat template.
        control_tokens: encode control tokens in rows as control tokens.

    Raises:
        UserError: an option needs a chat template and there is none, or the template does not read an argument.
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
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.instruction, self.suffix, self.system = instruction, suffix, system
        self.template_arguments = dict(template_arguments or {})
        self.control_tokens = control_tokens
        self.name = _name(tokenizer)
        self._closing: int | None = None
        self._check_options()

    def _check_options(self) -> None:
        if self.chat_template and not self._template:
            raise UserError(
                f"the tokenizer of {self.name} has no chat template; set `data.chat_template: false` for prompts that "
                "are text"
            )
        if not self.chat_template:
            for option in ("system", "template_arguments"):
                if getattr(self, option):
                    raise UserError(
                        f"`data.{option}` is for a chat template; set `data.chat_template: true`"
                    )
        taken = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - {
            "tools",
            "documents",
            "kwargs",
        }
        for argument in self.template_arguments:
            if argument in taken or argument == "messages":
                raise UserError(
                    f"`data.template_arguments` cannot set `{argument}`, which is set for each row"
                )
            if argument not in ("tools", "documents") and not re.search(
                rf"\b{re.escape(argument)}\b", self._template
            ):
                raise UserError(
                    f"`data.template_arguments` sets `{argument}`, which the chat template of {self.name} does not read"
                )

    # --- properties of the tokenizer ------------------------------------------------------------------------------

    @cached_property
    def _template(self) -> str:
        template = getattr(self.tokenizer, "chat_template", None) or ""
        return "\n".join(template.values()) if isinstance(template, Mapping) else template

    @cached_property
    def _frame(self) -> list[int]:
        """Tokens that the tokenizer adds in front of a text."""
        for token in range(min(100, len(self.tokenizer))):
            text = "" if token in self._special else str(self.tokenizer.decode([token]))
            plain = (
                list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
            )
            if plain:
                framed = list(self.tokenizer(text)["input_ids"])
                starts = range(len(framed) - len(plain) + 1)
                return framed[: next((i for i in starts if framed[i : i + len(plain)] == plain), 0)]
        return []

    @cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(
            self.tokenizer.all_special_ids
        )
        return {
            i for i in special if not BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(i)))
        }

    @cached_property
    def _control(self) -> dict[int, str]:
        """Text of each control token, by its id."""
        control = {i: str(self.tokenizer.convert_ids_to_tokens(i)) for i in self._special}
        for i, token in self.tokenizer.added_tokens_decoder.items():
            if (
                self.chat_template
                and token.content in self._template
                and not token.content.isspace()
            ):
                control[i] = token.content
        return control

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(
            (text for text in self._control.values() if text), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _unknown(self) -> int | None:
        """Id of the token for unknown text; None: there is none."""
        if self.tokenizer.unk_token_id is not None:
            return self.tokenizer.unk_token_id
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        token = getattr(model, "unk_token", None)
        return None if token is None else self.tokenizer.get_vocab().get(token)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    # --- one row --------------------------------------------------------------------------------------------------

    def messages(self, row: PromptRow) -> Messages:
        """Return the chat of a row, with the system message, the instruction and the suffix."""
        messages = [dict(message) for message in row.messages] or [
            {"role": "user", "content": row.prompt}
        ]
        messages[-1]["content"] = f"{self.instruction}{messages[-1]['content']}{self.suffix}"
        if self.system and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def texts(self, row: PromptRow) -> list[str]:
        """Return the texts of a row that are encoded: one of each message, or that of the prompt."""
        return [str(message["content"]) for message in self.messages(row)]

    def encode(self, row: PromptRow) -> list[int]:
        """Return the tokens of a row's prompt.

        Raises:
            UserError: the template refuses the row, takes too long, or a text cannot be encoded.
        """
        if row.messages and not self.chat_template:
            raise no_template(self.tokenizer, row)
        return self._encode_chat(row) if self.chat_template else self._encode_text(row)

    def thinks(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends by opening a thought."""
        return str(self.tokenizer.decode(list(tokens[-12:]))).rstrip().endswith(THOUGHT)

    def written_control_token(self, row: PromptRow) -> str | None:
        """Return the first control token in the texts of a row; None: there is none."""
        for text in strings(self.messages(row)):
            if match := self._pattern.search(text):
                return match[0]
        return None

    def _encode_text(self, row: PromptRow) -> list[int]:
        text = self.texts(row)[0]
        as_text = not self.control_tokens and bool(self._pattern.search(text))
        options = {"split_special_tokens": True} if as_text else {}
        tokens = self._tokenize([text], [row], **options)[0]
        if as_text and not self._special.isdisjoint(tokens):
            raise UserError(self._unsafe(row))
        if tokens[: len(self._frame)] == self._frame:
            return tokens
        return [*self._frame, *tokens]

    def _encode_chat(self, row: PromptRow) -> list[int]:
        messages = self.messages(row)
        if self.control_tokens or not self.written_control_token(row):
            return self._render(messages, row)
        if (
            "sanitize_control_tokens"
            not in inspect.signature(self.tokenizer.apply_chat_template).parameters
        ):
            raise UserError(f"{self._unsafe(row)} by this version of transformers")
        tokens = self._render(messages, row, sanitize_control_tokens=True)
        harmless = self._render(_without(messages, self._pattern), row)
        if self._count_special(tokens) != self._count_special(harmless):
            raise UserError(self._unsafe(row))
        return tokens

    def _count_special(self, tokens: Sequence[int]) -> int:
        return sum(token in self._special and token != self._unknown for token in tokens)

    def _unsafe(self, row: PromptRow) -> str:
        return (
            f"{describe(row)} writes the control token {self.written_control_token(row)!r}, which cannot be encoded as "
            "text; take it out, or set `data.control_tokens: true` if it is meant"
        )

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
        except Exception as error:  # templates raise what they like
            raise UserError(self._refusal(row, str(error) or type(error).__name__)) from error
        return list(encoded["input_ids"])

    def _refusal(self, row: PromptRow, reason: str) -> str:
        sentence = " ".join(reason.split())
        hint = (
            ""
            if self.system or "system" not in sentence.lower()
            else "; `data.system` gives a system message"
        )
        return f"the chat template of {self.name} cannot render {describe(row)}: {sentence[:200]}{hint}"

    def _tokenize(
        self, texts: list[str], rows: Sequence[PromptRow], **options: Any
    ) -> list[list[int]]:
        """Return the tokens of texts, without tokens that the tokenizer adds.

        Raises:
            UserError: the tokenizer does not know a character, or fails.
        """
        try:
            encoded: Any = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
                **options,
            )
            lists = [list(tokens) for tokens in encoded["input_ids"]]
        except Exception as error:  # tokenizers raises plain `Exception`
            if len(texts) > 1:
                return [
                    self._tokenize([text], [row], **options)[0]
                    for text, row in zip(texts, rows, strict=True)
                ]
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"the tokenizer of {self.name} cannot encode {describe(rows[0])}: {reason}"
            ) from error
        for tokens, text, row in zip(lists, texts, rows, strict=True):
            body = (
                tokens[len(self._frame) :] if tokens[: len(self._frame)] == self._frame else tokens
            )
            if self._unknown in body or (self._drops and text.strip() and not tokens):
                raise UserError(
                    f"{describe(row)} holds characters that the tokenizer does not know{self._sample(text)}"
                )
        return lists

    @cached_property
    def _drops(self) -> bool:
        """Whether the tokenizer drops unknown text without a token."""
        try:
            return not self.tokenizer("\ue123\U000f0000", add_special_tokens=False)["input_ids"]
        except Exception:  # it raises for unknown text, so it drops none
            return False

    def _sample(self, text: str) -> str:
        """Name the first character that the tokenizer does not know, if one can be found."""
        for character in dict.fromkeys(text):
            try:
                tokens = list(self.tokenizer(character, add_special_tokens=False)["input_ids"])
            except Exception:
                return f", such as {character!r}"
            if self._unknown in tokens or (self._drops and not tokens and not character.isspace()):
                return f", such as {character!r}"
        return ""

    # --- many rows ------------------------------------------------------------------------------------------------

    def try_template(self, rows: Sequence[PromptRow]) -> None:
        """Render rows in a child process, with limits: the first thousand, and one of each sequence of roles.

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
        """Count the tokens of each row's texts, without those of a template; `HUGE` for a text that must be over `limit`.

        Raises:
            UserError: the tokenizer does not know a character, or reads control tokens out of text.
        """
        counts: list[int] = []
        for start in range(0, len(rows), 1000):
            texts, owners = [], []
            for row in (part := rows[start : start + 1000]):
                for text in self.texts(row):
                    if len(text) <= limit * self.longest_token:
                        texts.append(text)
                        owners.append(row)
            lists = iter(self._tokenize(texts, owners) if texts else [])
            for row in part:
                count = 0
                for text in self.texts(row):
                    if len(text) > limit * self.longest_token:
                        count += HUGE
                        continue
                    tokens = next(lists)
                    count += len(tokens)
                    if self._reads_control_tokens(text, tokens, row):
                        raise UserError(
                            f"{describe(row)} becomes a control token by the tokenizer's normalisation; change it, or "
                            "set `data.control_tokens: true` if it is meant"
                        )
                counts.append(count)
        return counts

    def _reads_control_tokens(self, text: str, tokens: list[int], row: PromptRow) -> bool:
        """Whether a text without a control token becomes one: some tokenizers match them after normalisation."""
        if self.control_tokens or self._pattern.search(text) or self._special.isdisjoint(tokens):
            return False
        plain = self._tokenize([text], [row], split_special_tokens=True)[0]
        return self._count_special(plain) < self._count_special(tokens)

    def rendered_already(self, rows: Sequence[PromptRow]) -> str | None:
        """Return the control token that begins all prompts, as in rendered ones; None: there is no such token."""
        first = rows and self._pattern.match(self.texts(rows[0])[0])
        if not first or first[0] == self.tokenizer.eos_token:
            return None
        if first[0] != self.tokenizer.bos_token and first[0] not in self._template:
            return None
        return first[0] if all(self.texts(row)[0].startswith(first[0]) for row in rows) else None

    # --- the end of a response ------------------------------------------------------------------------------------

    def closing_token(self, row: PromptRow, end_tokens: Sequence[int]) -> int:
        """Return the token that ends a response: that of the template, if it is an end token, else the end of sequence.

        Raises:
            UserError: there is no end token.
        """
        if self._closing is None:
            self._closing = self._find_closing_token(row, end_tokens)
        return self._closing

    def _find_closing_token(self, row: PromptRow, end_tokens: Sequence[int]) -> int:
        if self.chat_template and end_tokens:
            mark = "ANSWER"
            messages = [*self.messages(row), {"role": "assistant", "content": mark}]
            try:
                with time_limit(RENDER_SECONDS):
                    apply = partial(self.tokenizer.apply_chat_template, tokenize=False)
                    before = str(
                        apply(
                            self.messages(row),
                            add_generation_prompt=True,
                            **self.template_arguments,
                        )
                    )
                    text = str(apply(messages, **self.template_arguments))
            except Exception:  # the template takes no message of the assistant
                text = before = ""
            tail = text[len(before) :] if text.startswith(before) else text.rpartition(mark)[2]
            tokens = list(
                self.tokenizer(tail.removeprefix(mark), add_special_tokens=False)["input_ids"]
            )
            for token in tokens:
                if token in end_tokens:
                    return int(token)
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            return int(eos)
        if end_tokens:
            return end_tokens[0]
        raise UserError(
            f"the tokenizer of {self.name} has no token that ends a response, which a demonstration needs; give it an "
            "`eos_token`"
        )

    def encode_solution(self, row: PromptRow, end_tokens: Sequence[int]) -> list[int]:
        """Return the tokens of a row's solution, closed by the token that ends a response.

        Control tokens in it are encoded as control tokens, as the policy can write them. None of them may end it early.

        Raises:
            UserError: the row has no solution, or one with an end token or unknown characters.
        """
        return self.encode_solutions([row], end_tokens)[0]

    def encode_solutions(
        self, rows: Sequence[PromptRow], end_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Return the tokens of the rows' solutions, as `encode_solution` does.

        Raises:
            UserError: a row has no solution, or one that cannot be imitated.
        """
        texts: list[str] = []
        for row in rows:
            if row.solution is None:
                raise UserError(
                    f"{describe(row)} has no solution to imitate; give the data a solution column"
                )
            if not row.solution.strip():
                raise UserError(
                    f"the solution of {describe(row)} is empty; a demonstration needs something to imitate"
                )
            texts.append(row.solution)
        if not rows:
            return []
        closing = self.closing_token(rows[0], end_tokens)
        encoded = self._tokenize(texts, rows)
        for row, tokens in zip(rows, encoded, strict=True):
            early = next((token for token in tokens if token in {closing, *end_tokens}), None)
            if early is not None:
                text = self.tokenizer.convert_ids_to_tokens(early)
                raise UserError(
                    f"the solution of {describe(row)} holds the end token {text!r}; leave it out, it is added"
                )
        return [[*tokens, closing] for tokens in encoded]


def describe(row: PromptRow) -> str:
    """Describe a row for a message, by its prompt and its place."""
    place = f" ({row.where})" if row.where else ""
    return f"the prompt {row.prompt[:60]!r}{place}"


def strings(value: Any) -> Iterator[str]:
    """Yield the texts in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)


def _without(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return messages with all matches of a pattern taken out."""
    if isinstance(value, str):
        while pattern.search(value):
            value = pattern.sub("", value)
        return value
    if isinstance(value, Mapping):
        return {key: _without(part, pattern) for key, part in value.items()}
    return (
        [_without(part, pattern) for part in value] if isinstance(value, (list, tuple)) else value
    )
