"""A trial of optimizer and scheduler on one small weight, before a model is loaded."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.scores import ScoreRequest

STEPS = 1000
"""Largest number of updates of a trial."""
LARGEST_RATE = 1e6
_MISTAKES = (
    ValueError,
    TypeError,
    ImportError,
    AssertionError,
    KeyError,
    IndexError,
    ZeroDivisionError,
    OverflowError,
)


def try_optimizer(
    optimizer: Callable[[Any], Any],
    scheduler: Callable[[Any], Any] | None,
    *,
    parts: tuple[str, ...] = ("policy",),
    vectors: bool = False,
    learning_rates: Mapping[str, float] | None = None,
    updates: int = -1,
) -> None:
    """Build both for weights of 2 x 2, and step the scheduler.

    Args:
        optimizer: makes the optimizer of the module.
        scheduler: makes its scheduler; None: none.
        parts: parts of the policy that are trained; each is a group of parameters.
        vectors: some weights have one dimension, as scales of norms do.
        learning_rates: learning rates by part.
        updates: `trainer.max_steps`; -1: not known.

    Raises:
        UserError: one refuses its options, or sets a value that is not finite or a learning rate
            out of range.
    """
    # learning rates name trained parts
    rates = learning_rates or {}
    unknown = [name for name in rates if name not in parts]
    if unknown:
        raise UserError(
            f"`learning_rates` names {unknown[0]!r}, which is not trained; there are "
            f"{sorted(parts)}"
        )
    # a small weight for each part
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2, 2))]}
        | ({"lr": rates[part]} if part in rates else {})
        for part in parts
    ]
    with _quiet():
        made = _make("optimizer", optimizer, groups)
        if made is None:
            return
        _check_groups(made, "`model.optimizer`", 0)
        if vectors:
            _try_vectors(optimizer)
        try:
            plan = _make("scheduler", scheduler, made) if scheduler is not None else None
        except UserError as error:
            if not isinstance(error.__cause__, ZeroDivisionError):
                raise
            raise UserError(
                f"`model.scheduler` divides by zero; with `trainer.max_steps: {updates}` a phase "
                "of it may have no update: give more updates, or `model.scheduler: null`"
            ) from error
        if plan is not None:
            _check_scheduler(made, plan, updates)


def _make(name: str, factory: Callable[[Any], Any], argument: Any) -> Any:
    """Call a factory; None: it fails for a reason that may not apply to real weights."""
    try:
        return factory(argument)
    except UserError:
        raise
    except _MISTAKES as error:
        raise UserError(f"`model.{name}`: {first_sentence(error)}") from error
    except Exception:
        return None


def _try_vectors(optimizer: Callable[[Any], Any]) -> None:
    try:
        optimizer([torch.nn.Parameter(torch.zeros(2))])
    except _MISTAKES as error:
        raise UserError(
            "`model.optimizer` takes no weights of one dimension, and norms have such: "
            f"{first_sentence(error)}; use torch.optim.AdamW, or `policy.lora`, whose weights are "
            "matrices"
        ) from error


def trained_parts(policy: Policy, request: ScoreRequest) -> tuple[str, ...]:
    """Return the parts of a policy that an objective trains: `policy`, and `mtp` or `critic`.

    Args:
        policy: need not be built.
        request: of the objective.
    """
    has_heads = getattr(policy, "mtp", None) is not None
    has_critic = getattr(policy, "critic", None) is not None
    heads = ("mtp",) if has_heads and request.future else ()
    critic = ("critic",) if has_critic and request.values else ()
    return ("policy", *heads, *critic)


def has_vectors(policy: Policy) -> bool:
    """Return whether norms are trained: they are, unless only adapters are trained."""
    return isinstance(policy, LoadedPolicy) and policy.lora is None


def make_optimizer(factory: Callable[[Any], Any], weights: Any) -> Any:
    """Make the optimizer of a run.

    Args:
        factory: `model.optimizer`.
        weights: that are trained, or groups of them.

    Raises:
        UserError: it refuses them, as one does that takes matrices alone.
    """
    try:
        return factory(weights)
    except _MISTAKES as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`model.optimizer` does not take the weights: {first_sentence(error)}"
        ) from error


def first_sentence(error: BaseException) -> str:
    """Return the message of an exception in one line, with its type if the message is short."""
    text = " ".join(str(error).split())
    return text if len(text) > 15 else f"{type(error).__name__}: {text}"


def _check_groups(optimizer: Any, owner: str, update: int) -> None:
    """Refuse infinite values of parameter groups, and learning rates outside 0 to the largest."""
    for group in getattr(optimizer, "param_groups", ()):
        for key, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"{owner} sets `{key}` to {value} at update {update}; it must be a finite "
                    "number"
                )
        rate = float(group.get("lr", 0.0))
        if not 0 <= rate <= LARGEST_RATE:
            raise UserError(
                f"{owner} sets the learning rate to {rate:g} at update {update}; it must be from "
                f"0 to {LARGEST_RATE:g}"
            )


def _check_scheduler(optimizer: Any, scheduler: Any, updates: int) -> None:
    # kinds that are not stepped per update
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "`model.scheduler: ReduceLROnPlateau` waits for a metric, and schedulers are stepped "
            "once per update, between validations; use a schedule of updates such as "
            "`CosineAnnealingLR`, or `EarlyStopping` on the metric"
        )
    if not isinstance(scheduler, LRScheduler):
        raise UserError(
            f"`model.scheduler` must make a torch scheduler, got {type(scheduler).__name__}"
        )
    # its length
    total = getattr(scheduler, "total_steps", None)
    if isinstance(total, int) and updates > total:
        raise UserError(
            f"`model.scheduler: {type(scheduler).__name__}` ends after `total_steps` = {total} "
            "updates, and "
            f"`trainer.max_steps` is {updates}; give it `total_steps: ${{trainer.max_steps}}`"
        )
    # values of each update
    owner = f"`model.scheduler: {type(scheduler).__name__}`"
    _check_groups(optimizer, owner, 0)
    for update in range(1, min(updates, STEPS) + 1):
        try:
            scheduler.step()
        except _MISTAKES as error:
            raise UserError(f"{owner} fails at update {update}: {first_sentence(error)}") from error
        _check_groups(optimizer, owner, update)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of optimizers and schedulers, as the run itself will repeat them."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
