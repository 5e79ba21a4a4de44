"""Functions as rewards, with the signature that TRL uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward, RewardError
from lightning_mpo.rewards.importing import load_object

PER_ROW = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Arguments of a function of one response, as verl calls it. `ground_truth` is the target,
`data_source` a column or an empty text, and `extra_info` a column or the whole row."""
BATCH = ("prompts", "completions", "completion_ids", "prompt", "target", "solution")
"""Arguments that a reward function may take, whatever the columns of the data."""


class FunctionReward(Reward):
    """Calls `f(prompts=…, completions=…, completion_ids=…, **columns)` as TRL does.

    The function returns a list with one number or None per completion. A function that takes
    `solution_str` is called as verl does, once per completion: `f(data_source=…, solution_str=…,
    ground_truth=…, extra_info=…)`. It returns a number, or a mapping with a `score`.

    Every argument is a list with one entry per completion. Completions are strings, also for chats,
    unless `messages`. A function without `**kwargs` gets only the arguments that it names. It may be `async`.

    Args:
        function: an import path such as `my_module.f`, a file and a name such as `rewards.py:f`, or
            any callable.
        weight: factor of this reward in the sum.
        accuracy: a score over 0.5 means "right", which validation counts as solved.
        messages: prompts and completions are lists of messages, as TRL passes them for chats:
            `completion[0]["content"]` is the response.

    Raises:
        UserError: there is no such function, or `messages` is set for a function of one response.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        weight: float = 1.0,
        accuracy: bool = False,
        messages: bool = False,
    ) -> None:
        super().__init__(weight)
        self.function = load_object(function) if isinstance(function, str) else function
        if not callable(self.function) or isinstance(self.function, type):
            raise UserError(f"`FunctionReward.function` must be a function, got {function!r:.60}")
        self.is_accuracy, self.messages = accuracy, messages
        if messages and self._is_per_row():
            raise UserError(
                f"`FunctionReward.messages` is for functions of lists; `{self.title}` takes "
                "`solution_str`, which is one text"
            )

    @property
    def title(self) -> str:
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__name__", type(function).__name__))

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.title).strip("_") or "function"

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuse a function with an argument that is neither in `BATCH` nor a column.

        Raises:
            RewardError: there is such an argument.
        """
        known = (*PER_ROW, *columns) if self._is_per_row() else (*BATCH, *columns)
        missing = [name for name in self._required() if name not in known]
        if missing:
            raise RewardError(
                f"reward `{self.title}` takes `{missing[0]}`, which it is not given; a reward "
                "function may take "
                f"{', '.join(f'`{name}`' for name in dict.fromkeys(known))}, or "
                "`**kwargs`"
            )

    def score(self, completions: Sequence[Completion]) -> Any:
        """Return the result of the function, which may be a coroutine.

        Raises:
            RewardError: the function takes an argument that is neither in `BATCH` nor a column.
        """
        parameters = self._parameters()
        if self._is_per_row():
            return [self._call_on_row(completion) for completion in completions]
        columns = self._columns(completions)
        self.check_columns(list(columns))
        if parameters is None:  # built in, without a signature
            return self.function(columns["completions"])
        # only the arguments that the function names, unless it takes all
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            columns = {
                name: values
                for name, values in columns.items()
                if name in {p.name for p in parameters}
            }
        # arguments that cannot be given by name
        positional = [
            columns.pop(p.name)
            for p in parameters
            if p.kind is p.POSITIONAL_ONLY and p.name in columns
        ]
        try:
            return self.function(*positional, **columns)
        except TypeError as error:
            if "string indices" in str(error) and not self.messages:
                hint = "completions are texts; `messages: true` of `FunctionReward` passes messages"
                error.args = (f"{error}; {hint}",)
            raise

    def _is_per_row(self) -> bool:
        return any(p.name == "solution_str" for p in self._parameters() or [])

    def _call_on_row(self, completion: Completion) -> Any:
        """Call a function of one response, with the arguments that it names."""
        row = {name: value for name, value in completion.row.items() if isinstance(name, str)}
        arguments = {
            "data_source": "",
            "extra_info": row,
            **row,
            "solution_str": completion.text,
            "ground_truth": completion.target,
        }
        parameters = self._parameters() or []
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            names = {p.name for p in parameters}
            arguments = {name: value for name, value in arguments.items() if name in names}
        score = self.function(**arguments)
        return score.get("score") if isinstance(score, Mapping) else score

    def _columns(self, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        """Return all arguments by name, one value per completion.

        Columns of the data win over fields of the row, and the batch wins over both.
        """
        names = dict.fromkeys(name for c in completions for name in c.row if isinstance(name, str))
        columns = {name: [c.row.get(name) for c in completions] for name in names}
        batch: dict[str, list[Any]] = {
            "prompts": [c.chat if self.messages else c.prompt for c in completions],
            "completions": [
                [{"role": "assistant", "content": c.text}] if self.messages else c.text
                for c in completions
            ],
            "completion_ids": [list(c.token_ids) for c in completions],
        }
        row: dict[str, list[Any]] = {
            "prompt": [c.prompt for c in completions],
            "target": [c.target for c in completions],
            "solution": [c.solution for c in completions],
        }
        return row | columns | batch

    def _parameters(self) -> list[inspect.Parameter] | None:
        try:
            return list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):
            return None

    def _required(self) -> list[str]:
        parameters = self._parameters() or []
        return [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
