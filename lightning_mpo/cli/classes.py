"""The classes that a configuration may name, and their arguments."""

from __future__ import annotations

import importlib
import inspect
import sys
from inspect import Parameter
from typing import Any

from lightning_mpo import callbacks as callback_classes
from lightning_mpo import data, modules, policies, rewards, rollout, sampling
from lightning_mpo.objective import (
    action_spaces,
    advantages,
    block_weights,
    corrections,
    future_credit,
    kl,
    likelihoods,
    reductions,
    segmenters,
    selection,
    supports,
    surrogates,
    terms,
)
from lightning_mpo.objective.objective import Objective
from lightning_mpo.resume.metrics_csv import MetricsCSV

BASES: tuple[type, ...] = (
    supports.Support,
    action_spaces.ActionSpace,
    block_weights.BlockWeights,
    future_credit.FutureCredit,
    segmenters.Segmenter,
    advantages.Advantage,
    surrogates.Surrogate,
    selection.Selection,
    reductions.Reduction,
    corrections.Correction,
    likelihoods.Likelihood,
    kl.Controller,
    terms.LossTerm,
    policies.Policy,
    policies.MTPHeads,
    policies.Critic,
    rewards.Reward,
    sampling.Sampler,
    rollout.DynamicSampling,
    data.PromptDataModule,
)
"""Base classes whose subclasses a configuration may name."""
WITHOUT_BASE: tuple[type, ...] = (
    rollout.DynamicSampling,
    policies.Lora,
    policies.Quantization,
    Objective,
    MetricsCSV,
)
"""Classes that a configuration fills in and that have no base class of this package."""


def classes() -> dict[str, type]:
    """Return every class that a configuration may name, by its short name."""
    by_name: dict[str, type] = {
        name: getattr(callback_classes, name) for name in callback_classes.__all__
    }
    by_name |= {name: getattr(modules, name) for name in modules.__all__}
    by_name |= {known.__name__: known for known in WITHOUT_BASE}
    # all subclasses of the bases, a user's included
    waiting: list[Any] = list(BASES)
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            by_name[subclass.__name__] = subclass
            waiting.append(subclass)
    return by_name


def parameters_of(owner: Any) -> list[str]:
    """Return the names of a class's arguments.

    A constructor with `**kwargs` passes arguments on, so those of its base class follow.
    """
    names: list[str] = []
    for base in getattr(owner, "__mro__", ()):
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        names += [
            name
            for name, parameter in parameters.items()
            if name != "self"
            and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
            and name not in names
        ]
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def imported_class(class_path: str) -> Any:
    """Return a class that the parser has imported already; None: there is none."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name, None) if module in sys.modules else None
