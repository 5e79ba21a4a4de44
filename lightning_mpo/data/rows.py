"""Makes a `PromptRow` of one row of a file: a plain prompt, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mpo.data.tables import cell, checked_text, target_cell, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

MESSAGES = "messages"
"""The column that is read if a row has no prompt column."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_columns(owner: str, **columns: str | None) -> None:
    """Refuse one column in two roles: a prompt that is also the target gives the answer away.

    Args:
        owner: section of the options, for messages.
        columns: names of columns by option; None: not used.

    Raises:
        UserError: a name is empty, or two options have the same one.
    """
    names = [(option, column) for option, column in columns.items() if column is not None]
    for i, (option, column) in enumerate(names):
        if not column:
            raise UserError(f"`{owner}.{option}` must name a column, got an empty text")
        for other, same in names[:i]:
            if same == column:
                raise UserError(
                    f"`{owner}.{other}` and `{owner}.{option}` are the same column, {column!r}"
                )


def prompt_row(
    line: Any, where: str, prompt: str, target: str | None, solution: str | None = None
) -> PromptRow:
    """Return the `PromptRow` of one row of a file.

    Args:
        line: the row: an object with columns.
        where: place of the row, for messages.
        prompt: column of the prompt, which is text or a list of messages. A row without it may have
            `messages`. A last message of the assistant is not part of the prompt but the solution.
        target: column of the right answer; None: no answer is known.
        solution: column of the solution, which takes precedence over a message of the assistant.

    Raises:
        UserError: a column is missing, null, empty or of another type.
    """
    # the column of the prompt, or the messages
    is_chat = isinstance(line, Mapping) and prompt not in line and MESSAGES in line
    column = MESSAGES if is_chat else prompt
    value = cell(line, column, where)
    # a chat, whose last message of the assistant is the solution; or a text
    messages: tuple[Mapping[str, Any], ...] = ()
    answer: str | None = None
    if isinstance(value, list) and (
        is_chat or not value or any(isinstance(part, Mapping) for part in value)
    ):
        messages, answer = _messages(value, f"{where}: {column!r}")
        text = messages[-1]["content"]
    elif is_chat:
        raise UserError(
            f"{where}: {column!r} must be a list of messages, got {type(value).__name__}"
        )
    else:
        text = text_cell(line, column, where)
    if not text.strip():
        raise UserError(f"{where}: {column!r} is empty; write a prompt, or take the row out")
    # solution and target
    if solution is not None:
        answer = text_cell(line, solution, where)
    if answer is not None and not answer.strip():
        raise UserError(
            f"{where}: the solution is empty; a demonstration needs something to imitate"
        )
    right_answer = "" if target is None else target_cell(line, target, where)
    # columns for rewards; `target` and `solution` are text there as well
    texts = {
        "target": right_answer if target == "target" else None,
        "solution": answer if solution == "solution" else None,
    }
    return PromptRow(
        prompt=text,
        target=right_answer,
        solution=answer,
        extra={key: line[key] if (read := texts.get(key)) is None else read for key in line},
        messages=messages,
        where=where,
    )


def _messages(value: list[Any], where: str) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Return the messages before the answer, and the answer of the assistant if there is one."""
    messages = [
        _message(message, f"{where}, message {i}") for i, message in enumerate(value, start=1)
    ]
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if not messages:
        raise UserError(f"{where} has no message to answer; it needs a message of the user")
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where} ends with a message of the role {messages[-1]['role']!r}; the last one "
            "before the answer must be the user's or a tool's"
        )
    return tuple(messages), answer


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"{where} must be an object with 'role' and 'content', got {type(message).__name__}"
        )
    if "role" not in message or "content" not in message:
        missing = "role" if "role" not in message else "content"
        hint = "; ShareGPT's 'from' and 'value' are not read" if "from" in message else ""
        raise UserError(
            f"{where} has no {missing!r}; its keys are {', '.join(map(repr, message))}{hint}"
        )
    if message["role"] not in ROLES:
        raise UserError(
            f"{where}: the role must be one of {', '.join(ROLES)}, got {message['role']!r}"
        )
    # Parquet fills a key that only some messages have with null
    given = {key: value for key, value in message.items() if value is not None}
    return {**given, "content": _content(message, where)}


def _content(message: Mapping[str, Any], where: str) -> str:
    """Return the text of a message; parts of text are joined."""
    content = message["content"]
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        kind = "null" if content is None else type(content).__name__
        raise UserError(f"{where}: 'content' must be text or a list of text parts, got {kind}")
    return checked_text(content, "content", where)


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def describe(row: PromptRow) -> str:
    """Describe a row for a message, by the beginning of its prompt and its place in the file."""
    place = f" ({row.where})" if row.where else ""
    return f"the prompt {row.prompt[:60]!r}{place}"
