"""Every numeric option of every class that a configuration may name refuses numbers that make no sense."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest

from lightning_mpo import checks
from lightning_mpo.cli.classes import classes
from lightning_mpo.data import Multiplication
from lightning_mpo.errors import UserError
from lightning_mpo.modules.trainer_options import check_trainer_options, check_training
from lightning_mpo.objective.kl import ConstantCoefficient
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.segmenters import DelimiterSegmenter
from lightning_mpo.policies import ParallelHeads, TinyPolicy
from tests.support import reward_numbers

TRIED = {"-1": -1, "0": 0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 10**30}
"""Values that are tried on each option; for options of whole numbers as well as for others."""
SIGNED = "a coefficient may have either sign, and 0 switches it off"
OFF = "0 switches it off"
SHARE = "0 is the end of an interval that has a meaning"
IDS = ("AllowedTokens.ids", "FirstTokens.tokens", "OnlyTokens.tokens", "RolloutLoop.stop")
LARGE = "a seed may be large, and is bounded by 64 bits"
ALLOWED: dict[str, dict[str, str]] = {
    **reward_numbers.ALLOWED,
    **{f"ClippedRatio.{end}": {"0": "no step beyond a ratio of 1"} for end in ("high", "low")},
    "CodeAnswer.weight": {"-1": SIGNED, "0": "measured only"},
    "ConstantCoefficient.coefficient": {"0": OFF},
    "EntropyBonus.coef": {"-1": SIGNED, "0": SIGNED},
    "EntropySegmenter.quantile": {"0": "cuts at every token above the least entropy"},
    **{name: {"0": "the first id"} for name in IDS},
    "FutureShare.share": {"0": "the whole weight is on the first token"},
    "GeneralizedAdvantage.gamma": {"0": SHARE},
    "GeneralizedAdvantage.lam": {"0": SHARE},
    "HeadUpkeep.coef": {"0": OFF},
    "KillAt.rank": {"0": "the first process"},
    "Lora.dropout": {"0": OFF},
    "MaskedWeights.low": {"0": "no lower bound"},
    "MeanField.prompt_share": {"0": "the prompt stays visible"},
    "MemoryAccounting.canary_every": {"0": OFF},
    "MetricsCSV.version": {"0": "the first version"},
    "PolicyOptimization.learning_rates": {"0": "holds a part still"},
    "Predictions.show_order": {"0": OFF},
    "PositionClip.power": {"-1": SIGNED, "0": "one clip for all positions"},
    "ReturnToGo.gamma": {"0": SHARE},
    "RolloutProgressBar.refresh_rate": {"0": "Lightning's word for no bar"},
    "SampledTokens.prefix": {"0": "no prefix"},
    "Scaffolded.levels": {"0": "without a scaffold"},
    "ValueLoss.coef": {"0": OFF},
    "SpanShare.noise": {"0": OFF},
}
"""Values that an option takes although they were tried, and why."""
GENERAL: dict[str, dict[str, str]] = {
    "weight": {"-1": SIGNED, "0": "measured only"},
    "careless_share": {"0": "no careless solutions"},
    "validation_share": {"0": "no rows are held out"},
}
"""Likewise by the name of an option, for every class."""
SEEDS = re.compile(r"(^|_)seed$")

REQUIRED: dict[str, Callable[[], dict[str, Any]]] = {
    **reward_numbers.REQUIRED,
    "AdaptiveCoefficient": lambda: {"target": 0.1},
    "CausalPolicy": lambda: {"source": "folder"},
    **dict.fromkeys(("CodeLines", "CodeWindows", "CommentedLines"), lambda: {"paths": ["stdlib"]}),
    "ConstantLength": lambda: {"length": 8},
    "DiffusionSampler": lambda: {"block": 8},
    "EntropySegmenter": lambda: {"quantile": 0.5},
    "ExplicitWeights": lambda: {"values": [1.0]},
    "FirstTokens": lambda: {"tokens": [1]},
    "HeadWarmup": lambda: {"policy": small(mtp=ParallelHeads())},
    **{name: lambda: {"train": "rows.jsonl"} for name in ("JsonLines", "Table")},
    "KLPenalty": lambda: {"controller": ConstantCoefficient()},
    "MaskedTokens": lambda: {"canvas": 32},
    "KillAt": lambda: {"phase": "update", "count": 1},
    "MetricsCSV": lambda: {"save_dir": "."},
    **{f"{kind}Multiplication": lambda: {"digits": 4} for kind in ("", "Forgetful")},
    "PolicyOptimization": lambda: {"policy": small(), "objective": objective()},
    "ReasoningGym": lambda: {"task": "chain_sum"},
    "ReferenceUpdate": lambda: {"every": 4},
    "PromptFile": lambda: {"path": "rows.jsonl"},
    "Mixed": lambda: {"base": Multiplication(digits=4), "others": [Multiplication(digits=4)]},
    "Scaffolded": lambda: {"base": Multiplication(digits=4)},
    "SegmentActions": lambda: {"segmenter": DelimiterSegmenter()},
    "SupervisedWarmup": lambda: {"policy": small()},
}
"""What classes need besides the option under test."""
INSTEAD = {"EntropySegmenter.threshold": {"quantile": None}, "SampledTokens.prefix": {"cap": None}}
"""Other options that must change along with one."""


def small(**options: Any) -> TinyPolicy:
    return TinyPolicy(hidden_size=32, layers=1, heads=2, **options)


def objective() -> Objective:
    from lightning_mpo.objective import (
        action_spaces,
        advantages,
        reductions,
        selection,
        supports,
        surrogates,
    )

    return Objective(
        supports.FullVocabulary(),
        action_spaces.TokenActions(),
        advantages.GroupRelative(),
        surrogates.ClippedRatio(),
        selection.AllTokens(),
        reductions.TokenMean(),
    )


def parameters(owner: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class; `**kwargs` stands for those of its base."""
    found: dict[str, inspect.Parameter] = {}
    for base in owner.__mro__:
        if "__init__" not in base.__dict__:
            continue
        own = inspect.signature(base.__init__).parameters
        found = {
            name: p for name, p in own.items() if name != "self" and p.kind not in (2, 4)
        } | found
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def described(owner: type) -> set[type]:
    """Return the dataclasses that the arguments of a class are annotated with."""
    space = vars(sys.modules[owner.__module__])
    names = {
        name for p in parameters(owner).values() for name in re.findall(r"\w+", str(p.annotation))
    }
    return {space[name] for name in names if dataclasses.is_dataclass(space.get(name))}


def configurable() -> dict[str, type]:
    """Return every class that a configuration may name, and the dataclasses of their arguments, and theirs."""
    todo = [c for c in classes().values() if inspect.isclass(c) and not inspect.isabstract(c)]
    found: dict[str, type] = {}
    while todo:
        owner = todo.pop()
        if owner.__name__ not in found and owner.__module__.startswith("lightning_mpo"):
            found[owner.__name__] = owner
            todo += described(owner)
    return found


def numeric(owner: type) -> Iterator[str]:
    for name, parameter in parameters(owner).items():
        if re.search(r"\b(int|float)\b", str(parameter.annotation)):
            yield name


OPTIONS = sorted(
    f"{owner}.{name}" for owner, known in configurable().items() for name in numeric(known)
)


def build(owner: type, option: str, value: Any) -> Any:
    name = owner.__name__
    kind = str(parameters(owner)[option].annotation)
    given = {"dict": {"policy": value}, "list": [value]}.get(re.split(r"\W", kind)[0], value)
    needed = REQUIRED[name]() if name in REQUIRED else {}
    return owner(**needed | INSTEAD.get(f"{name}.{option}", {}) | {option: given})


def test_options_are_found():
    assert len(OPTIONS) > 100
    for known in (
        "RolloutLoop.prompts",
        "Lora.rank",
        "ValueLoss.clip",
        "JsonLines.max_prompt_tokens",
        "Nucleus.p",
    ):
        assert known in OPTIONS
    assert set(ALLOWED) | set(INSTEAD) <= set(OPTIONS), (
        "an exception for an option that is not there"
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_is_refused_in_one_line_or_stands_in_the_table(option):
    owner, _, name = option.partition(".")
    allowed = ALLOWED.get(option) or GENERAL.get(name, {})
    if SEEDS.search(name):
        allowed = {"0": LARGE}
    for text, value in TRIED.items():
        try:
            build(configurable()[owner], name, value)
        except UserError as error:
            message = str(error)
            assert text not in allowed, (
                f"{option} = {value} is in the table, and refused: {message}"
            )
            assert name in message, f"{option} = {value} is refused without its name: {message}"
            assert len(message.splitlines()) == 1
        else:
            assert text in allowed, (
                f"{option} = {value} is taken; check it with `lightning_mpo.checks`"
            )


TRAINER_OPTIONS = list(numeric(L.Trainer))
TRAINER_ALLOWED = {
    "max_steps": {"-1", "0"},  # no limit; refused by `check_training`
    "max_epochs": {"-1", "0"},
    "num_sanity_val_steps": {"-1", "0"},  # all; none
    "devices": {"-1"},  # all
    **{name: {"0"} for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches")},
    **{
        name: {"0"}
        for name in ("limit_predict_batches", "overfit_batches", "min_steps", "min_epochs")
    },
    **{
        name: {"0"}
        for name in ("log_every_n_steps", "reload_dataloaders_every_n_epochs", "fast_dev_run")
    },
    "gradient_clip_val": {"0"},  # off
    "max_time": set(TRIED),  # its numbers stand in a mapping, which Lightning checks
}


@pytest.mark.parametrize("option", TRAINER_OPTIONS)
def test_a_number_of_the_trainer_is_refused_in_one_line_or_stands_in_the_table(option):
    allowed = TRAINER_ALLOWED.get(option, set())
    for text, value in TRIED.items():
        if text in allowed:
            check_trainer_options({option: value})
            continue
        with pytest.raises(UserError, match=f"`trainer.{option}` must") as caught:
            check_trainer_options({option: value})
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("option", ["max_steps", "max_epochs", "limit_train_batches"])
def test_limits_that_train_nothing_are_refused(option):
    check_training({option: 1})
    with pytest.raises(UserError, match=f"`trainer.{option}: 0` trains nothing"):
        check_training({option: 0})


@pytest.mark.parametrize("devices", ["x", "", "²", [], [0, 0], [-1], ["a"], [True]])
def test_devices_that_are_none(devices):
    with pytest.raises(UserError, match="`trainer.devices`"):
        check_trainer_options({"devices": devices})
    for good in ("auto", "0,1", "2", "-1", [0, 1], 2, None):
        check_trainer_options({"devices": good})


def test_a_new_unchecked_option_is_noticed():
    class Unchecked:
        def __init__(self, size: int | None = None, scales: list[float] = ()) -> None:
            self.size = size

    assert list(numeric(Unchecked)) == ["size", "scales"]
    build(Unchecked, "size", -1)  # nothing refuses it, so that the test above would fail


@pytest.mark.parametrize("value", [1, 2.5, 1e-12])
def test_numbers_within_pass(value):
    checks.positive("A", x=value)
    checks.not_below("A", 0, x=value, y=0, z=None)
    checks.finite("A", x=-value)
    checks.within("A", "(0, 3]", x=value, y=3)
    for wrong in (True, "1", [1]):
        for check, bounds in (
            (checks.positive, ()),
            (checks.not_below, (0,)),
            (checks.above, (1,)),
            (checks.finite, ()),
        ):
            with pytest.raises(UserError, match="`A.x` must be a number"):
                check("A", *bounds, x=wrong)


def test_whole_numbers_and_choices():
    checks.at_least("A", 2, x=2, y=None)
    checks.one_of("A", ("a", "b"), x="a")
    for wrong in (2.5, True, "3"):
        with pytest.raises(UserError, match="`A.x` must be a whole number"):
            checks.at_least("A", 2, x=wrong)
    with pytest.raises(UserError, match="`A.x` must be 'a' or 'b', got 'c'"):
        checks.one_of("A", ("a", "b"), x="c")
    with pytest.raises(UserError, match="at most 10,000,000, got 10000001"):
        checks.at_least("A", 2, x=10**7 + 1)
