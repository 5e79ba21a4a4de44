"""Prompt, target and solution of a row: a column by its name, or a Jinja template of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_mpo.data.reading import WrittenFloat
from lightning_mpo.data.rows import check_columns, prompt_row
from lightning_mpo.data.tables import without
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


class Columns:
    """Reads prompt, target and solution of rows.

    Each is the name of a column, or a Jinja template such as `"{{ question }} = "`. A text with
    `{{` or `{%` is a template.

    Args:
        prompt: of the prompt. A column may hold text or a list of messages; without such a column a
            row may have `messages`.
        target: of the right answer; None: no answer is known.
        solution: of a solution; None: a last message of the assistant, or none.

    Raises:
        UserError: a template has a syntax error, two options are the same column, or a name is
            empty.

    Example:
        >>> columns = Columns("{{ a }}+{{ b }}=", "sum")
        >>> columns.row({"a": 1, "b": 2, "sum": 3}, "row 1").prompt
        '1+2='
    """

    def __init__(
        self, prompt: str = "prompt", target: str | None = "target", solution: str | None = None
    ) -> None:
        options = {"prompt": prompt, "target": target, "solution": solution}
        check_columns("data", **options)
        self.prompt, self.target, self.solution = prompt, target, solution
        self.templates = {
            text: Template(text, f"data.{option}")
            for option, text in options.items()
            if text is not None and is_template(text)
        }

    def row(self, record: Any, where: str) -> PromptRow:
        """Return the `PromptRow` of a row of a table.

        Args:
            record: values by the names of their columns.
            where: place of the row, for messages.

        Raises:
            UserError: a column is missing, null, empty or of another type.
        """
        if not self.templates or not isinstance(record, Mapping):
            return prompt_row(record, where, self.prompt, self.target, self.solution)
        # the text of a template stands in a column of its name, until the row is read
        texts = {text: template.render(record, where) for text, template in self.templates.items()}
        row = prompt_row({**record, **texts}, where, self.prompt, self.target, self.solution)
        return replace(row, extra={name: row.extra[name] for name in record})


def is_template(text: str) -> bool:
    """Return whether a text is a template rather than the name of a column."""
    return "{{" in text or "{%" in text


class Template:
    """A Jinja template over the columns of a row, in Jinja's sandbox.

    A null is refused, as Jinja would write "None". Numbers keep the digits of their file.

    Args:
        text: the template.
        option: the option that holds it, for messages.

    Raises:
        UserError: it has a syntax error.
    """

    def __init__(self, text: str, option: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.option = option
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_written, keep_trailing_newline=True
        )
        try:
            self.names = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(
                f"`{option}` is not a valid Jinja template: {error.message} (line {error.lineno})"
            ) from error
        self.names -= set(environment.globals)

    def render(self, record: Mapping[str, Any], where: str) -> str:
        """Return the text for a row.

        Args:
            record: values by the names of their columns.
            where: place of the row, for messages.

        Raises:
            UserError: the template names a column that the row lacks, writes a null, or fails.
        """
        from jinja2 import UndefinedError

        try:
            return self._template.render(record)
        except UserError as error:
            raise UserError(f"{where}: the template `{self.option}` {error}") from error
        except Exception as error:  # a template may raise any exception
            missing = sorted(self.names - set(record))
            if missing and isinstance(error, UndefinedError):
                raise UserError(
                    f"{without(record, missing[0], where)}; the template `{self.option}` names it"
                ) from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{where}: the template `{self.option}` fails: {reason}") from error


def _written(value: Any) -> Any:
    """Return a value as a template writes it."""
    if value is None:
        raise UserError("writes a null; write {{ COLUMN or '' }} for a column that may be empty")
    return value.digits if isinstance(value, WrittenFloat) else value
