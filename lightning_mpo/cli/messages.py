"""Turns the configuration parser's reports into one line that says what to write instead."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import lightning as L

from lightning_mpo import callbacks as callback_classes
from lightning_mpo import data, modules, policies, rewards, rollout, sampling
from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.other_names import ARGUMENTS, OPTIONS
from lightning_mpo.objective import (
    action_spaces,
    advantages,
    corrections,
    kl,
    reductions,
    segmenters,
    selection,
    supports,
    surrogates,
    terms,
    value_loss,
)
from lightning_mpo.objective.objective import Objective
from lightning_mpo.resume.metrics_csv import MetricsCSV

_ROOTS: tuple[type, ...] = (
    supports.Support,
    action_spaces.ActionSpace,
    action_spaces.BlockWeights,
    segmenters.Segmenter,
    advantages.Advantage,
    surrogates.Surrogate,
    selection.Selection,
    reductions.Reduction,
    corrections.Correction,
    kl.Controller,
    policies.Policy,
    policies.MTPHeads,
    policies.Critic,
    rewards.Reward,
    sampling.Sampler,
    rollout.DynamicSampling,
    data.PromptDataModule,
)
_OTHERS: tuple[type, ...] = (
    kl.KLPenalty,
    rollout.DynamicSampling,
    policies.Lora,
    policies.Quantization,
    Objective,
    terms.EntropyBonus,
    terms.WeightPenalty,
    terms.HeadUpkeep,
    value_loss.ValueLoss,
    MetricsCSV,
)
"""Classes without a base of their own that a configuration fills in."""
_SECTIONS = (
    "model",
    "data",
    "rollout",
    "trainer",
    "seed_everything",
    "ckpt_path",
    "warmup",
    "include",
    "config",
)


NEAR = 0.66
"""Least similarity of a name that is suggested: one that is further away leads astray."""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean …?" where a candidate is close, else nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=NEAR)
    return f"; did you mean `{close[0]}`?" if close else ""


def one_line(report: str) -> str:
    """Rewrite a report of jsonargparse.

    Example:
        >>> one_line("Subcommand 'fit' does not accept option 'rollout.promts'")
        'no option `rollout.promts`; did you mean `rollout.prompts`?'
    """
    report = " ".join(report.split())
    for pattern, rewrite in _RULES:
        found = re.search(pattern, report)
        if found:
            return rewrite(report, *found.groups())
    return _innermost(report)


def _no_option(report: str, option: str) -> str:
    section, _, name = option.rpartition(".")
    pointer = OPTIONS.get(name)
    place = _place(report)
    if pointer:
        return f"{place}no option `{option}`: {pointer}"
    owner: Any = {"rollout": RolloutLoop, "trainer": L.Trainer}.get(section)
    if owner is None and section:  # the whole section may be unknown
        first = option.split(".")[0]
        return f"{place}no option `{option}`{suggest(first, _SECTIONS) if first not in _SECTIONS else ''}"
    hint = suggest(name, _parameters(owner) if owner else _SECTIONS)
    return f"{place}no option `{option}`{hint.replace('`', f'`{section}.', 1) if section and hint else hint}"


def _no_axis(report: str, group: str, option: str) -> str:
    known = _parameters(Objective) if group.rsplit(".", 1)[-1] == "objective" else []
    listed = f"; there are {', '.join(known)}" if known else ""
    return f"{_place(report)}`{group}` has no option `{option}`{suggest(option, known) or listed}"


def _no_word(report: str, word: str) -> str:
    return f"`{word}` stands alone; a recipe or a file follows `-c`: `-c {word}`, and a value follows its option"


def _no_argument(report: str, class_path: str, option: str) -> str:
    name = class_path.rsplit(".", 1)[-1]
    pointer = ARGUMENTS.get(name, {}).get(option)
    if pointer:
        return f"{_place(report)}`{name}` has no argument `{option}`; it is {pointer}"
    known = _parameters(_classes().get(name) or _find(class_path))
    if option.split(".")[0] == "initargs":
        return f"{_place(report)}`initargs` must be written `init_args`"
    listed = f"; it takes {', '.join(known)}" if known else "; it takes none"
    hint = suggest(option, known) or listed
    return f"{_place(report)}`{name}` has no argument `{option}`{hint}"


def _no_class(report: str, name: str) -> str:
    known = _classes().get(name.rsplit(".", 1)[-1])
    if known is not None:
        kind = next(
            (f"a `{root.__name__}`" for root in _ROOTS if issubclass(known, root)), "something else"
        )
        return f"{_place(report)}`{name}` is {kind}, which does not belong here"
    return f"{_place(report)}no class `{name}`{suggest(name.rsplit('.', 1)[-1], _classes())}"


def _no_module(report: str, class_path: str, module: str) -> str:
    if class_path.split(".")[0] != module.split(".")[0]:
        return f"{_place(report)}`{class_path}` cannot be imported: no module `{module}`"
    here = (
        os.getcwd()
        if {"", os.getcwd()} & set(sys.path)
        else "PYTHONPATH (and not in the working folder: safe path)"
    )
    return f"{_place(report)}no module `{module}` for `{class_path}`; looked in {here} and among the packages"


def _no_attribute(report: str, class_path: str, name: str) -> str:
    module = class_path.removesuffix(f".{name}")
    file = getattr(sys.modules.get(module), "__file__", None)
    known = (
        [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        if file
        else []
    )
    return f"{_place(report)}no `{name}` in `{module}`{f' ({file})' if file else ''}{suggest(name, known)}"


def _wrong_type(report: str, wanted: str, value: str) -> str:
    if "Sequence" in wanted:
        hint = f"; write '[{value}]'" if re.fullmatch(r"[\w./:-]+", value) else ""
        return f"{_place(report)}must be a list, got {value[:80]}{hint}"
    kind = wanted.removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
    value = re.split(r" Given value type|\. Got value", value)[0]
    return f"{_place(report)}must be {_KINDS.get(kind, kind)}, got {value[:80]}"


def _no_choice(report: str, choices: str, value: str) -> str:
    return f"{_place(report)}must be one of {choices}, got {value[:80]}"


def _missing_argument(report: str, class_path: str, name: str) -> str:
    hint = (
        "; an algorithm sets it: add one, such as `-c grpo`" if name.startswith("objective") else ""
    )
    return f"{_place(report)}`{class_path.rsplit('.', 1)[-1]}` needs the argument `{name}`{hint}"


def _missing_in_factory(report: str, name: str, class_path: str) -> str:
    owner = class_path.rsplit(".", 1)[-1]
    if name in ("optimizer", "params"):
        return f"{_place(report)}`{owner}` is a function, and a class is needed, such as one of torch.optim"
    return f"{_place(report)}`{owner}` needs the argument `{name}`"


def _required(report: str, key: str) -> str:
    place = _place(report)
    if place:
        return f"{place}needs the argument `{key.strip(',')}`"
    key = key.strip(",").split(".", 1)[-1]
    return f"`{key}` is required; give it in a configuration file (-c) or on the command line"


def _reward_path(report: str, problem: str) -> str:
    return f"{_place(report)}{problem}"


def _no_reward(report: str, value: str) -> str:
    return (
        f"{_place(report)}{value[:80]} is no reward: name a `Reward` class or a function of `completions`; options of a "
        "function stand in {class_path: FunctionReward, init_args: {function: my_module.f, weight: 1.0}}"
    )


def _ambiguous(report: str, name: str, paths: str) -> str:
    return f"{_place(report)}several classes are called `{name}`; write the whole path: {paths.strip(' .')}"


def _no_factory_module(report: str, module: str) -> str:
    return (
        f"{_place(report)}no module `{module}`: it must be installed, or lie in the working folder"
    )


def _other_kind(report: str, path: str, kind: str) -> str:
    name = path.strip() or _given(report)
    if "pytorch_lightning" in name:
        return f"{_place(report)}{name} is of another package; write lightning.pytorch in place of pytorch_lightning"
    return f"{_place(report)}{name} is no `{kind}`, which is needed here"


def _no_class_given(report: str, value: str) -> str:
    return f"{_place(report)}must name a class (`class_path`), got {value[:80]}"


def _not_of_kind(report: str, kind: str) -> str:
    return f"{_place(report)}must name a `{kind}` (`class_path`, and `init_args`), got {_given(report)[:80]}"


def _no_mapping(report: str, value: str) -> str:
    return f"{_place(report)}must be a mapping of options, got {value[:80]}"


def _not_of_type(report: str, reason: str) -> str:
    return f"{_place(report)}{reason[:200].strip()}"


def _no_member(report: str, kinds: str) -> str:
    """Name the simple types and words that a union takes."""
    literals = re.findall(r"Literal\[([^\]]*)\]", kinds)
    plain = re.findall(r"<class '([\w.]+)'>", kinds)
    names = [_KINDS.get(name.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]) for name in plain]
    names = [", ".join(literals), *names] if literals else names
    return f"{_place(report)}must be {' or '.join(dict.fromkeys(names))}, got {_given(report)[:80]}"


def _given(report: str) -> str:
    """Return the value that the innermost report is about."""
    found = re.findall(r"Given value: (.*?)(?= - |$)", report)
    return found[0] if found else "something else"


def _innermost(report: str) -> str:
    """Return the reason that stands deepest in a report, with its place."""
    parts = re.split(r"Problem with given class_path '[^']+': |Parser key \"[^\"]+\": ", report)
    reason = re.split(
        r" - Expected a <class 'NoneType'>| Given value type| - Not a valid subclass", parts[-1]
    )[0]
    place = _place(report)
    return f"{place}{reason if len(reason) < 300 else reason[:300] + ' …'}"


_KINDS = {
    "NoneType": "null",
    "Sequence": "a list",
    "list": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
}
_RULES = (
    (r"Group '([^']+)' does not accept option '([^']+)'", _no_axis),
    (r"does not accept option '([^']+)'", _no_option),
    (r"unrecognized arguments: --([^\s=]+)", _no_option),
    (r"unrecognized arguments: ([^-\s]\S*)", _no_word),
    (
        r".*Problem with given class_path '([^']+)': (?:Parser key \"[^\"]*\": )?Option '([^']+)' is not accepted",
        _no_argument,
    ),
    (
        r"(?=.*callable class: Option '[^']+' is not accepted.*?class_path='([^']+)').*Option '([^']+)' is",
        _no_argument,
    ),
    (
        r"callable class: the following arguments are required: (\w+).*?class_path='([^']+)'",
        _missing_in_factory,
    ),
    (
        r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: ([\w., ]+?)(?= - |$)",
        _ambiguous,
    ),
    (r"Expected '([^']+)' to be a subclass of <class '(\w+)'>", _other_kind),
    (
        r"Expected an import path or a subclass spec, but got (.+?)(?:\. Got value| - |$)",
        _no_class_given,
    ),
    (r".*Import path (\S* ?)does not correspond to a subclass of (\w+)", _other_kind),
    (r".*Expected a dot import path string: (\S+)", _no_class),
    (r".*Problem with given class_path '([^']+)': No module named '([^']+)'", _no_module),
    (
        r".*Problem with given class_path '([^']+)': (?:module|type object) '[^']+' has no attribute '([^']+)'",
        _no_attribute,
    ),
    (r"Not of type RewardPath: ((?:reward|there is no file) .+?) Given value type", _reward_path),
    (r"No module named '([^']+)'", _no_factory_module),
    (r".*Not of type \w+: (.+?) - Expected", _not_of_type),
    (r".*Expected a (<class '[^']+'>)\.? Got value: (.+?)(?: - |$)", _wrong_type),
    (r".*Expected a typing\.Literal\[([^\]]+)\]\. Got value: (\S+)", _no_choice),
    (
        r".*given class_path '([^']+)': the following arguments are required: ([^\s,]+)",
        _missing_argument,
    ),
    (r"Key \"([^\"]+)\" is required", _required),
    (r"arguments are required: (\S+)", _required),
    (r"Not of type RewardPath: .* Given value: (.+)$", _no_reward),
    (r"Unable to load config '([^']*)'", _no_mapping),
    (r".*Not a valid subclass of (\w+)(?!.*Problem with given class_path)", _not_of_kind),
    (
        r".*Union subtypes Subtypes: \[(.*?)\] Errors:(?!.*Problem with given class_path)",
        _no_member,
    ),
)


def _place(report: str) -> str:
    """Return the dotted key that a report is about; keys of inner parsers may repeat those of outer ones."""
    path = ""
    for key in re.findall(r"Parser key \"([^\"]+)\"", report):
        inside = key == path or key.startswith(f"{path}.") or path.endswith(f".{key}")
        path = (
            (path if len(path) > len(key) else key)
            if path and inside
            else f"{path}.{key}".lstrip(".")
        )
    return f"`{path}`: " if path else ""


def _parameters(owner: Any) -> list[str]:
    """Return the arguments of a class; where it passes others on, those of its base as well."""
    found: list[str] = []
    for base in getattr(owner, "__mro__", ()):
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(base.__init__).parameters
        found += [
            name
            for name, p in own.items()
            if name != "self" and p.kind not in (2, 4) and name not in found
        ]
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def _find(class_path: str) -> Any:
    """Return a class that the parser has imported already."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name, None) if module in sys.modules else None


def _classes() -> dict[str, type]:
    """Every class that a configuration may name, by its short name."""
    found: dict[str, type] = {
        name: getattr(callback_classes, name) for name in callback_classes.__all__
    }
    found |= {name: getattr(modules, name) for name in modules.__all__}
    found |= {known.__name__: known for known in _OTHERS}
    todo: list[Any] = list(_ROOTS)
    while todo:
        for child in todo.pop().__subclasses__():
            found[child.__name__] = child
            todo.append(child)
    return found
