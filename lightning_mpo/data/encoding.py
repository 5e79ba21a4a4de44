"""From text to tokens: no unknown characters, and no control tokens by accident."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token for one byte. It is ordinary text, also if a tokenizer marks it as special."""


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer for messages."""
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "the policy"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source of a tokenizer's chat template, of all templates if there are several."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template


class TextEncoder:
    """Encodes texts with one tokenizer.

    Control tokens are special tokens, and added tokens that the chat template writes. Text of rows
    never becomes a control token, unless `control_tokens` allows it.

    Args:
        tokenizer: of the policy.
        template: source of the chat template that is applied; empty: none is applied.
        control_tokens: encode control tokens in texts as control tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str = "", control_tokens: bool = False
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.control_tokens = control_tokens
        self.name = name_of(tokenizer)

    # --- properties of the tokenizer --------------------------------------------------------------

    @cached_property
    def frame(self) -> list[int]:
        """Tokens that the tokenizer adds in front of a text."""
        for token in range(min(100, len(self.tokenizer))):
            text = "" if token in self.special else str(self.tokenizer.decode([token]))
            plain = (
                list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
            )
            if plain:
                framed = list(self.tokenizer(text)["input_ids"])
                starts = range(len(framed) - len(plain) + 1)
                return framed[: next((i for i in starts if framed[i : i + len(plain)] == plain), 0)]
        return []

    @cached_property
    def special(self) -> set[int]:
        """Ids of the special tokens, without tokens for single bytes."""
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(
            self.tokenizer.all_special_ids
        )
        return {
            i for i in special if not BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(i)))
        }

    @cached_property
    def control(self) -> dict[int, str]:
        """Text of each control token, by its id."""
        control = {i: str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.special}
        for i, token in self.tokenizer.added_tokens_decoder.items():
            if self.template and token.content in self.template and not token.content.isspace():
                control[i] = token.content
        return control

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Pattern of the texts of all control tokens."""
        longest_first = sorted(
            (text for text in self.control.values() if text), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def unknown(self) -> int | None:
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

    @cached_property
    def drops_unknown(self) -> bool:
        """Whether the tokenizer drops unknown text without a token."""
        try:
            return not self.tokenizer("\ue123\U000f0000", add_special_tokens=False)["input_ids"]
        except Exception:  # it raises for unknown text, so it drops none
            return False

    # --- control tokens ---------------------------------------------------------------------------

    def first_control_token(self, texts: Iterable[str]) -> str | None:
        """Return the first control token that texts contain; None: there is none."""
        for text in texts:
            if match := self.control_pattern.search(text):
                return match[0]
        return None

    def count_special(self, tokens: Sequence[int]) -> int:
        """Count the special tokens, without the token for unknown text."""
        return sum(token in self.special and token != self.unknown for token in tokens)

    def normalises_to_control(self, text: str, tokens: list[int], row: PromptRow) -> bool:
        """Return whether a text without a control token is encoded as one.

        Some tokenizers look for control tokens after they have normalised the text.

        Args:
            text: the text.
            tokens: its encoding.
            row: the row of the text, for messages.
        """
        if (
            self.control_tokens
            or self.control_pattern.search(text)
            or self.special.isdisjoint(tokens)
        ):
            return False
        plain = self.tokenize([text], [row], split_special_tokens=True)[0]
        return self.count_special(plain) < self.count_special(tokens)

    def unsafe(self, row: PromptRow, control_token: str | None) -> str:
        """Return the message for a row whose control token cannot be encoded as text."""
        return (
            f"{describe(row)} contains the control token {control_token!r}, which cannot be "
            "encoded as text; take it out, or set `data.control_tokens: true` if it is meant"
        )

    # --- encoding ---------------------------------------------------------------------------------

    def encode(self, text: str, row: PromptRow) -> list[int]:
        """Return the tokens of a text, with the tokens that the tokenizer adds in front.

        Args:
            text: the text.
            row: the row of the text, for messages.

        Raises:
            UserError: the tokenizer does not know a character, or a control token in the text
                cannot be encoded as text.
        """
        as_text = not self.control_tokens and bool(self.control_pattern.search(text))
        options = {"split_special_tokens": True} if as_text else {}
        tokens = self.tokenize([text], [row], **options)[0]
        if as_text and not self.special.isdisjoint(tokens):
            raise UserError(self.unsafe(row, self.first_control_token([text])))
        if tokens[: len(self.frame)] == self.frame:
            return tokens
        return [*self.frame, *tokens]

    def tokenize(
        self, texts: list[str], rows: Sequence[PromptRow], **options: Any
    ) -> list[list[int]]:
        """Return the tokens of texts, without tokens that the tokenizer adds.

        Args:
            texts: the texts.
            rows: the row of each text, for messages.
            options: options of the tokenizer.

        Raises:
            UserError: the tokenizer does not know a character, or fails.
        """
        # encode all texts at once; after a failure one by one, to find the text
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
                    self.tokenize([text], [row], **options)[0]
                    for text, row in zip(texts, rows, strict=True)
                ]
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"the tokenizer of {self.name} cannot encode {describe(rows[0])}: {reason}"
            ) from error
        # refuse unknown characters
        for tokens, text, row in zip(lists, texts, rows, strict=True):
            body = tokens[len(self.frame) :] if tokens[: len(self.frame)] == self.frame else tokens
            if self.unknown in body or (self.drops_unknown and text.strip() and not tokens):
                raise UserError(
                    f"{describe(row)} holds characters that the tokenizer does not know"
                    f"{self._unknown_character(text)}"
                )
        return lists

    def _unknown_character(self, text: str) -> str:
        """Name the first character that the tokenizer does not know, if one can be found."""
        for character in dict.fromkeys(text):
            try:
                tokens = list(self.tokenizer(character, add_special_tokens=False)["input_ids"])
            except Exception:
                return f", such as {character!r}"
            if self.unknown in tokens or (
                self.drops_unknown and not tokens and not character.isspace()
            ):
                return f", such as {character!r}"
        return ""


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


def without_pattern(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return messages with all matches of a pattern taken out."""
    if isinstance(value, str):
        while pattern.search(value):
            value = pattern.sub("", value)
        return value
    if isinstance(value, Mapping):
        return {key: without_pattern(part, pattern) for key, part in value.items()}
    return (
        [without_pattern(part, pattern) for part in value]
        if isinstance(value, (list, tuple))
        else value
    )


def no_template(tokenizer: PreTrainedTokenizerBase, row: PromptRow) -> UserError:
    """Return the error for a chat without a template: option off, or none in the tokenizer."""
    if tokenizer.chat_template:
        return UserError(
            f"{describe(row)} is a chat, which needs a template; set `data.chat_template: true`"
        )
    return UserError(
        f"{describe(row)} is a chat, but the tokenizer of {name_of(tokenizer)} has no chat "
        "template; take a model that has one, or prompts that are text"
    )
