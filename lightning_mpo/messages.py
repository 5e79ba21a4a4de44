"""Turns the configuration parser's reports into one line that says what to write instead."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import lightning as L

from lightning_mpo import (
    action_spaces,
    advantages,
    corrections,
    data,
    kl,
    modules,
    policies,
    reductions,
    rewards,
    rollout,
    segmenters,
    selection,
    supports,
    surrogates,
)
from lightning_mpo import callbacks as callback_classes
from lightning_mpo.callbacks import Rollout

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
    rollout.Sampler,
    rollout.DynamicSampling,
    data.PromptDataModule,
)
_ELSEWHERE = {
    "rollout": {
        "num_generations": "completions",
        "max_completion_length": "max_new_tokens",
        "num_iterations": "epochs",
        "reward_funcs": "rewards",
    },
    "Lora": {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout"},
}
"""Names that TRL and peft give to options, by the section or class that has them."""

_SECTIONS = ("model", "data", "rollout", "trainer", "seed_everything", "ckpt_path", "warmup", "include", "config")


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean …?" where a candidate is close, else nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _translate(owner: str, name: str) -> str:
    """Return the hint for an option that another library names otherwise, else nothing."""
    known = _ELSEWHERE.get(owner, {}).get(name)
    return f"; it is `{known}` here" if known else ""


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
    return report if len(report) < 400 else report[:400] + " …"


def _no_option(report: str, option: str) -> str:
    section, _, name = option.rpartition(".")
    owner: Any = {"rollout": Rollout, "trainer": L.Trainer}.get(section)
    known = _parameters(owner) if owner else _SECTIONS
    hint = _translate(section, name) or suggest(name, known)
    return f"no option `{option}`{hint.replace('`', f'`{section}.', 1) if section and hint else hint}"


def _no_word(report: str, word: str) -> str:
    return f"`{word}` stands alone; a recipe or a file follows `-c`: `-c {word}`, and a value follows its option"


def _no_argument(report: str, class_path: str, option: str) -> str:
    name = class_path.rsplit(".", 1)[-1]
    known = _parameters(_classes().get(name))
    listed = f"; it takes {', '.join(known)}" if known else "; it takes none"
    hint = _translate(name, option) or suggest(option, known) or listed
    return f"{_place(report)}`{name}` has no argument `{option}`{hint}"


def _no_class(report: str, name: str) -> str:
    known = _classes().get(name.rsplit(".", 1)[-1])
    if known is not None:
        kind = next((f"a `{root.__name__}`" for root in _ROOTS if issubclass(known, root)), "something else")
        return f"{_place(report)}`{name}` is {kind}, which does not belong here"
    return f"{_place(report)}no class `{name}`{suggest(name.rsplit('.', 1)[-1], _classes())}"


def _no_module(report: str, class_path: str, module: str) -> str:
    if class_path.split(".")[0] != module.split(".")[0]:
        return f"{_place(report)}`{class_path}` cannot be imported: no module `{module}`"
    here = os.getcwd() if {"", os.getcwd()} & set(sys.path) else "PYTHONPATH (and not in the working folder: safe path)"
    return f"{_place(report)}no module `{module}` for `{class_path}`; looked in {here} and among the packages"


def _no_attribute(report: str, class_path: str, name: str) -> str:
    module = class_path.removesuffix(f".{name}")
    file = getattr(sys.modules.get(module), "__file__", None)
    known = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)] if file else []
    return f"{_place(report)}no `{name}` in `{module}`{f' ({file})' if file else ''}{suggest(name, known)}"


def _wrong_type(report: str, wanted: str, value: str) -> str:
    if "Sequence" in wanted:
        hint = f"; write '[{value}]'" if re.fullmatch(r"[\w./:-]+", value) else ""
        return f"{_place(report)}must be a list, got {value[:80]}{hint}"
    kind = wanted.removeprefix("<class '").removesuffix("'>")
    return f"{_place(report)}must be {kind}, got {value[:80]}"


def _no_choice(report: str, choices: str, value: str) -> str:
    return f"{_place(report)}must be one of {choices}, got {value[:80]}"


def _missing_argument(report: str, class_path: str, name: str) -> str:
    hint = "; an algorithm sets it: add one, such as `-c grpo`" if name.startswith("objective") else ""
    return f"{_place(report)}`{class_path.rsplit('.', 1)[-1]}` needs the argument `{name}`{hint}"


def _required(report: str, key: str) -> str:
    key = key.strip(",").split(".", 1)[-1]
    return f"`{key}` is required; give it in a configuration file (-c) or on the command line"


def _reward_path(report: str, problem: str) -> str:
    return f"{_place(report)}{problem}"


def _no_reward(report: str, value: str) -> str:
    return (
        f"{_place(report)}{value[:80]} is no reward: name a `Reward` class or a function of `completions`; options of a "
        "function stand in {class_path: FunctionReward, init_args: {function: my_module.f, weight: 1.0}}"
    )


_RULES = (
    (r"Not of type RewardPath: ((?:reward|there is no file) .+?) Given value type", _reward_path),
    (r"does not accept option '([^']+)'", _no_option),
    (r"unrecognized arguments: --([^\s=]+)", _no_option),
    (r"unrecognized arguments: ([^-\s]\S*)", _no_word),
    (
        r".*Problem with given class_path '([^']+)': (?:Parser key \"[^\"]*\": )?Option '([^']+)' is not accepted",
        _no_argument,
    ),
    (r".*Expected a dot import path string: (\S+)", _no_class),
    (r".*Problem with given class_path '([^']+)': No module named '([^']+)'", _no_module),
    (
        r".*Problem with given class_path '([^']+)': (?:module|type object) '[^']+' has no attribute '([^']+)'",
        _no_attribute,
    ),
    (r".*Expected a (<class '[^']+'>)\.? Got value: (.+?)(?: - |$)", _wrong_type),
    (r".*Expected a typing\.Literal\[([^\]]+)\]\. Got value: (\S+)", _no_choice),
    (r".*given class_path '([^']+)': the following arguments are required: ([^\s,]+)", _missing_argument),
    (r"Key \"([^\"]+)\" is required", _required),
    (r"arguments are required: (\S+)", _required),
    (r"Not of type RewardPath: .* Given value: (.+)$", _no_reward),
)


def _place(report: str) -> str:
    keys = re.findall(r"Parser key \"([^\"]+)\"", report)
    path = ".".join(keys)
    return f"`{path}`: " if path else ""


def _parameters(owner: Any) -> list[str]:
    if owner is None:
        return []
    return [name for name in inspect.signature(owner.__init__).parameters if name not in ("self", "kwargs")]


def _classes() -> dict[str, type]:
    """Every class that a configuration may name, by its short name."""
    found: dict[str, type] = {name: getattr(callback_classes, name) for name in callback_classes.__all__}
    found |= {name: getattr(modules, name) for name in modules.__all__}
    found |= {known.__name__: known for known in (kl.KLPenalty, rollout.DynamicSampling)}
    found |= {known.__name__: known for known in (policies.Lora, policies.Quantization)}
    todo: list[Any] = list(_ROOTS)
    while todo:
        for child in todo.pop().__subclasses__():
            found[child.__name__] = child
            todo.append(child)
    return found
