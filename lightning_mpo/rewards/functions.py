"""Functions as rewards, with the signature that TRL uses, and rewards given by a path."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward, RewardError
from lightning_mpo.rewards.calling import describe

BATCH = ("prompts", "completions", "completion_ids", "prompt", "target", "solution")
"""Arguments that a function may take with any data."""


class FunctionReward(Reward):
    """Calls `f(prompts=…, completions=…, completion_ids=…, **columns) -> list[float | None]`, as TRL does.

    Every argument is a list with one entry per completion; completions are strings, also for chats. A function without
    `**kwargs` gets only the arguments that it names. It may be `async`.

    Args:
        function: an import path such as `my_module.f`, a file and a name such as `rewards.py:f`, or any callable.
        weight: factor of this reward in the sum.
        accuracy: a score over 0.5 means "right", which validation counts as solved.

    Raises:
        UserError: there is no such function.
    """

    def __init__(
        self, function: str | Callable[..., Any], weight: float = 1.0, accuracy: bool = False
    ) -> None:
        super().__init__(weight)
        self.function = load_object(function) if isinstance(function, str) else function
        if not callable(self.function) or isinstance(self.function, type):
            raise UserError(f"`FunctionReward.function` must be a function, got {function!r:.60}")
        self.is_accuracy = accuracy  # type: ignore[misc]

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
        missing = [name for name in self._required() if name not in (*BATCH, *columns)]
        if missing:
            raise RewardError(
                f"reward `{self.title}` takes `{missing[0]}`, which it is not given; a reward function may take "
                f"{', '.join(f'`{name}`' for name in dict.fromkeys([*BATCH, *columns]))}, or `**kwargs`"
            )

    def score(self, completions: Sequence[Completion]) -> Any:
        """Return the result of the function, which may be a coroutine.

        Raises:
            RewardError: the function takes an argument that is neither in `BATCH` nor a column.
        """
        columns = self._columns(completions)
        self.check_columns(list(columns))
        parameters = self._parameters()
        if parameters is None:  # built in, without a signature
            return self.function(columns["completions"])
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            columns = {
                name: values
                for name, values in columns.items()
                if name in {p.name for p in parameters}
            }
        first = [
            columns.pop(p.name)
            for p in parameters
            if p.kind is p.POSITIONAL_ONLY and p.name in columns
        ]
        return self.function(*first, **columns)

    def _columns(self, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for c in completions for name in c.row if isinstance(name, str))
        columns = {name: [c.row.get(name) for c in completions] for name in names}
        batch = {
            "prompts": [c.prompt for c in completions],
            "completions": [c.text for c in completions],
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


class RewardPath:
    """A reward that a configuration gives by its path: a function `my_module.f`, or `file.py:name`.

    Args:
        value: the path, or a mapping with `class_path` and `init_args`.

    Raises:
        UserError: there is no such reward, or it cannot be built.
    """

    def __init__(self, value: str | Mapping[str, Any]) -> None:
        self.value = value
        path, arguments = (
            (value, {})
            if isinstance(value, str)
            else (value["class_path"], value.get("init_args") or {})
        )
        self.reward = _make(path, load_object(path), dict(arguments))


def _read(value: Any) -> RewardPath:
    """Take the path of a function, or of a class in a file; the parser itself takes classes with an import path."""
    path = value if isinstance(value, str) else None
    if isinstance(value, Mapping) or hasattr(value, "class_path"):
        value = value if isinstance(value, Mapping) else vars(value)
        path = value.get("class_path")
    if not isinstance(path, str) or not (
        ".py:" in path or (isinstance(value, str) and "." in path)
    ):
        raise ValueError("no path of a function")
    if ".py:" not in path and isinstance(_try(path), type):
        raise ValueError("a class")
    return RewardPath(value)


def _try(path: str) -> Any:
    try:
        return load_object(path)
    except UserError:
        return None


register_type(RewardPath, lambda path: path.value, _read, fail_already_registered=False)

if TYPE_CHECKING:
    RewardLike = Reward | Callable[..., Any]
else:
    RewardLike = Reward | RewardPath


def as_rewards(rewards: Any) -> list[Reward]:
    """Return rewards as a list, with functions wrapped; a single reward needs no list.

    Raises:
        UserError: something is neither a reward nor a function.
    """
    alone = isinstance(rewards, Reward | RewardPath | str | type) or callable(rewards)
    if not alone and not isinstance(rewards, Sequence):
        raise UserError(
            f"`rollout.rewards` must be a list of rewards, got {type(rewards).__name__}"
        )
    return [as_reward(reward) for reward in ([rewards] if alone else rewards)]


def as_reward(reward: Any) -> Reward:
    """Return a reward as it is, and a function wrapped.

    Raises:
        UserError: it is neither.
    """
    if isinstance(reward, RewardPath):
        return reward.reward
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type):
        raise UserError(
            f"`rollout.rewards` holds the class `{reward.__name__}`; write `{reward.__name__}()`"
        )
    if callable(reward):
        return FunctionReward(reward)
    raise UserError(
        f"`rollout.rewards` holds {reward!r:.60}, which is neither a `Reward` nor a function of `completions`"
    )


def _make(path: str, target: Any, arguments: dict[str, Any]) -> Reward:
    if not isinstance(target, type):
        if arguments:
            raise UserError(
                f"reward {path!r} is a function; write {{class_path: FunctionReward, init_args: {{function: {path}, "
                "weight: 1.0}}"
            )
        return target if isinstance(target, Reward) else FunctionReward(target)
    if not issubclass(target, Reward):
        raise UserError(
            f"reward {path!r} is a class but not a subclass of `lightning_mpo.rewards.Reward`"
        )
    try:
        return target(**arguments)
    except UserError:
        raise
    except BaseException as error:
        raise UserError(f"reward {path!r} cannot be built: {describe(error)}") from error


def load_object(path: str) -> Any:
    """Import `package.module.name`, or `file.py:name`.

    Raises:
        UserError: there is no such module, file or name, or the import raises.
    """
    file, colon, name = path.rpartition(":")
    if not colon:
        file, _, name = path.rpartition(".")
    if not file or not name:
        raise UserError(
            f"reward {path!r} must be an import path such as `my_module.f`, or `file.py:name`"
        )
    try:
        module = (
            _module_of_file(Path(file).expanduser())
            if file.endswith(".py")
            else importlib.import_module(file)
        )
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{file}.".startswith(f"{error.name}."):
            raise UserError(
                f"no module `{error.name}` for `{path}`; looked in {Path.cwd()} and among the packages"
            ) from error
        raise UserError(f"reward {path!r} cannot be imported: {describe(error)}") from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, list(vars(module)), n=1)
        if close and colon == "":
            place = f"`{file}` ({getattr(module, '__file__', None)})"
            raise UserError(f"no `{name}` in {place}; did you mean `{close[0]}`?")
        near = ", ".join(
            n for n, v in vars(module).items() if callable(v) and not n.startswith("_")
        )
        raise UserError(
            f"reward {path!r}: {file} has no `{name}`; it has {near[:200] or 'no functions'}"
        )
    return getattr(module, name)


def _module_of_file(file: Path) -> Any:
    if (
        not file.is_file()
    ):  # a configuration is parsed in its folder; a run's copy of one lies elsewhere
        file = next((there for entry in sys.path if (there := Path(entry) / file).is_file()), file)
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r} with rewards (seen from {Path.cwd()})")
    name = f"reward_file_{file.resolve().with_suffix('').as_posix().strip('/').replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward file {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def blame(error: BaseException) -> UserError | None:
    """Return one line for an exception that comes from the constructor of a reward, None for another one."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and isinstance(owner, Reward):
            if isinstance(error, UserError):
                return error
            return UserError(f"reward `{type(owner).__name__}` cannot be built: {describe(error)}")
        trace = trace.tb_next
    other = error.__cause__ or error.__context__
    return None if other is None else blame(other)
