"""Makes rewards of the values that a user may give: rewards, functions, and paths of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Reward
from lightning_mpo.rewards.functions import FunctionReward
from lightning_mpo.rewards.importing import load_object
from lightning_mpo.rewards.isolation import describe


class RewardPath:
    """A reward that a configuration names by its path: a function `my_module.f`, or `file.py:name`.

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
    """Read the path of a function, or of a class in a file, for the parser.

    The parser itself reads classes with an import path.

    Raises:
        ValueError: the value is something else.
    """
    path = value if isinstance(value, str) else None
    if isinstance(value, Mapping) or hasattr(value, "class_path"):
        value = value if isinstance(value, Mapping) else vars(value)
        path = value.get("class_path")
    if not isinstance(path, str) or not (
        ".py:" in path or (isinstance(value, str) and "." in path)
    ):
        raise ValueError("no path of a function")
    if ".py:" not in path and isinstance(_object_or_none(path), type):
        raise ValueError("a class")
    return RewardPath(value)


def _object_or_none(path: str) -> Any:
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
        UserError: an entry is neither a reward nor a function.
    """
    is_single = isinstance(rewards, Reward | RewardPath | str | type) or callable(rewards)
    if not is_single and not isinstance(rewards, Sequence):
        raise UserError(
            f"`rollout.rewards` must be a list of rewards, got {type(rewards).__name__}"
        )
    return [as_reward(reward) for reward in ([rewards] if is_single else rewards)]


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
        f"`rollout.rewards` holds {reward!r:.60}, which is neither a `Reward` nor a function of "
        "`completions`"
    )


def _make(path: str, target: Any, arguments: dict[str, Any]) -> Reward:
    """Build the reward at the end of a path: a function, a reward, or a class with arguments."""
    # a function, or a reward that is built already
    if not isinstance(target, type):
        if arguments:
            raise UserError(
                f"reward {path!r} is a function; write {{class_path: FunctionReward, "
                f"init_args: {{function: {path}, weight: 1.0}}}}"
            )
        return target if isinstance(target, Reward) else FunctionReward(target)
    # a class
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


def blame(error: BaseException) -> UserError | None:
    """Return the error for an exception from the constructor of a reward; None for any other."""
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
