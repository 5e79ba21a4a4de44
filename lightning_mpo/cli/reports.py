"""One line for each kind of report of the parser: what is wrong, where, and what to write.

Each function takes the report and the groups of the pattern that recognised it (`messages.py`).
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import lightning as L

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.classes import BASES, classes, imported_class, parameters_of
from lightning_mpo.cli.other_libraries import ARGUMENTS, OPTIONS
from lightning_mpo.cli.suggestions import suggest
from lightning_mpo.objective.objective import Objective

SECTIONS = (
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
KINDS = {
    "NoneType": "null",
    "Sequence": "a list",
    "list": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
}
"""Plain words for names of types."""

# --- parts of a report ----------------------------------------------------------------------------


def place_of(report: str) -> str:
    """Return the dotted key that a report is about, as the beginning of a message."""
    path = ""
    for key in re.findall(r"Parser key \"([^\"]+)\"", report):
        # keys of inner parsers may repeat those of outer ones
        repeated = key == path or key.startswith(f"{path}.") or path.endswith(f".{key}")
        longer = path if len(path) > len(key) else key
        path = longer if path and repeated else f"{path}.{key}".lstrip(".")
    return f"`{path}`: " if path else ""


def innermost(report: str) -> str:
    """Return the innermost reason of a report, with its place."""
    parts = re.split(r"Problem with given class_path '[^']+': |Parser key \"[^\"]+\": ", report)
    reason = re.split(
        r" - Expected a <class 'NoneType'>| Given value type| - Not a valid subclass", parts[-1]
    )[0]
    return f"{place_of(report)}{reason if len(reason) < 300 else reason[:300] + ' …'}"


def _value_of(report: str) -> str:
    """Return the value that the innermost report is about."""
    values = re.findall(r"Given value: (.*?)(?= - |$)", report)
    return values[0] if values else "something else"


# --- options and arguments ------------------------------------------------------------------------


def no_option(report: str, option: str) -> str:
    """Answer an unknown option of a section."""
    section, _, name = option.rpartition(".")
    place = place_of(report)
    # an option of another library
    pointer = OPTIONS.get(name)
    if pointer:
        return f"{place}no option `{option}`: {pointer}"
    # an unknown section
    owner: Any = {"rollout": RolloutLoop, "trainer": L.Trainer}.get(section)
    if owner is None and section:
        first = option.split(".")[0]
        hint = suggest(first, SECTIONS) if first not in SECTIONS else ""
        return f"{place}no option `{option}`{hint}"
    # a misspelt option
    hint = suggest(name, parameters_of(owner) if owner else SECTIONS)
    if section and hint:
        hint = hint.replace("`", f"`{section}.", 1)
    return f"{place}no option `{option}`{hint}"


def no_axis(report: str, group: str, option: str) -> str:
    """Answer an unknown option of the objective or of another group."""
    known = parameters_of(Objective) if group.rsplit(".", 1)[-1] == "objective" else []
    listed = f"; there are {', '.join(known)}" if known else ""
    return f"{place_of(report)}`{group}` has no option `{option}`{suggest(option, known) or listed}"


def lone_word(report: str, word: str) -> str:
    """Answer a word that belongs to no option."""
    return (
        f"`{word}` follows no option: write `-c {word}` for a recipe or a file, and a value behind "
        "its option"
    )


def no_argument(report: str, class_path: str, option: str) -> str:
    """Answer an unknown argument of a class."""
    name = class_path.rsplit(".", 1)[-1]
    if name == "LightningDataModule":  # the base class, which stands for no choice
        return (
            f"`data` sets `{option}` before its class: write `class_path` beside it, or put the "
            "recipe with the class first"
        )
    pointer = ARGUMENTS.get(name, {}).get(option)
    if pointer:
        return f"{place_of(report)}`{name}` has no argument `{option}`; it is {pointer}"
    known = parameters_of(classes().get(name) or imported_class(class_path))
    if option.split(".")[0] == "initargs":
        return f"{place_of(report)}`initargs` must be written `init_args`"
    listed = f"; it takes {', '.join(known)}" if known else "; it takes none"
    hint = suggest(option, known) or listed
    return f"{place_of(report)}`{name}` has no argument `{option}`{hint}"


def missing_argument(report: str, class_path: str, name: str) -> str:
    """Answer a missing argument of a class."""
    owner = class_path.rsplit(".", 1)[-1]
    return f"{place_of(report)}`{owner}` needs the argument `{name}`"


def missing_argument_of_factory(report: str, name: str, class_path: str) -> str:
    """Answer a missing argument of a class that is built later, such as an optimiser."""
    owner = class_path.rsplit(".", 1)[-1]
    if name in ("optimizer", "params"):
        return (
            f"{place_of(report)}`{owner}` is a function, and a class is needed, such as one of "
            "torch.optim"
        )
    return f"{place_of(report)}`{owner}` needs the argument `{name}`"


def missing_option(report: str, key: str) -> str:
    """Answer a missing option."""
    place = place_of(report)
    if place:
        return f"{place}needs the argument `{key.strip(',')}`"
    key = key.strip(",").split(".", 1)[-1]
    return f"`{key}` is required; give it in a configuration file (-c) or on the command line"


# --- classes and modules --------------------------------------------------------------------------


def no_class(report: str, name: str) -> str:
    """Answer an unknown class, or a class in the wrong place."""
    known = classes().get(name.rsplit(".", 1)[-1])
    if known is not None:
        kind = next(
            (f"a `{base.__name__}`" for base in BASES if issubclass(known, base)), "something else"
        )
        return f"{place_of(report)}`{name}` is {kind}, which does not belong here"
    return f"{place_of(report)}no class `{name}`{suggest(name.rsplit('.', 1)[-1], classes())}"


def no_module(report: str, class_path: str, module: str) -> str:
    """Answer a module that cannot be imported."""
    if class_path.split(".")[0] != module.split(".")[0]:
        return f"{place_of(report)}`{class_path}` cannot be imported: no module `{module}`"
    here = (
        os.getcwd()
        if {"", os.getcwd()} & set(sys.path)
        else "PYTHONPATH (and not in the working folder: safe path)"
    )
    return (
        f"{place_of(report)}no module `{module}` for `{class_path}`; looked in {here} and among "
        "the packages"
    )


def no_module_of_factory(report: str, module: str) -> str:
    """Answer a module that cannot be imported, of a class that is built later."""
    return (
        f"{place_of(report)}no module `{module}`: it must be installed, or lie in the working "
        "folder"
    )


def no_attribute(report: str, class_path: str, name: str) -> str:
    """Answer a name that a module lacks."""
    module = class_path.removesuffix(f".{name}")
    file = getattr(sys.modules.get(module), "__file__", None)
    known = (
        [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        if file
        else []
    )
    shown = f"`{module}`{f' ({file})' if file else ''}"
    return f"{place_of(report)}no `{name}` in {shown}{suggest(name, known)}"


def ambiguous_class(report: str, name: str, paths: str) -> str:
    """Answer a short name that several classes have."""
    return (
        f"{place_of(report)}several classes are called `{name}`; write the whole path: "
        f"{paths.strip(' .')}"
    )


def other_kind(report: str, path: str, kind: str) -> str:
    """Answer a class of another kind than the option takes."""
    name = path.strip() or _value_of(report)
    if "pytorch_lightning" in name:
        return (
            f"{place_of(report)}{name} is of another package; write lightning.pytorch in place of "
            "pytorch_lightning"
        )
    return f"{place_of(report)}{name} is not a subclass of `{kind}`, which is needed here"


def no_class_given(report: str, value: str) -> str:
    """Answer a value in the place of a class."""
    return f"{place_of(report)}must name a class (`class_path`), got {value[:80]}"


def not_of_kind(report: str, kind: str) -> str:
    """Answer a value in the place of a class of a certain kind."""
    return (
        f"{place_of(report)}must name a `{kind}` (`class_path`, and `init_args`), "
        f"got {_value_of(report)[:80]}"
    )


# --- values ---------------------------------------------------------------------------------------


def wrong_type(report: str, expected: str, value: str) -> str:
    """Answer a value of another type than the option takes."""
    if "Sequence" in expected:
        hint = f"; write '[{value}]'" if re.fullmatch(r"[\w./:-]+", value) else ""
        return f"{place_of(report)}must be a list, got {value[:80]}{hint}"
    kind = expected.removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
    value = re.split(r" Given value type|\. Got value", value)[0]
    return f"{place_of(report)}must be {KINDS.get(kind, kind)}, got {value[:80]}"


def no_choice(report: str, choices: str, value: str) -> str:
    """Answer a word that is not among the choices of an option."""
    return f"{place_of(report)}must be one of {choices}, got {value[:80]}"


def no_mapping(report: str, value: str) -> str:
    """Answer a value in the place of a mapping."""
    return f"{place_of(report)}must be a mapping of options, got {value[:80]}"


def not_of_type(report: str, reason: str) -> str:
    """Answer a value that a type of jsonargparse refuses, with its reason."""
    return f"{place_of(report)}{reason[:200].strip()}"


def no_member(report: str, kinds: str) -> str:
    """Name the simple types and words that a union takes."""
    literals = re.findall(r"Literal\[([^\]]*)\]", kinds)
    plain = [name.rsplit(".", 1)[-1] for name in re.findall(r"<class '([\w.]+)'>", kinds)]
    names = [KINDS.get(name, name) for name in plain]
    names = [", ".join(literals), *names] if literals else names
    names = ["a list", *names] if re.search(r"\b[Ll]ist\[", kinds) else names
    return (
        f"{place_of(report)}must be {' or '.join(dict.fromkeys(names))}, got "
        f"{_value_of(report)[:80]}"
    )


# --- rewards --------------------------------------------------------------------------------------


def wrong_reward_path(report: str, problem: str) -> str:
    """Answer the path of a reward that cannot be loaded, with the reason."""
    return f"{place_of(report)}{problem}"


def no_reward(report: str, value: str) -> str:
    """Answer a value in the place of a reward."""
    return (
        f"{place_of(report)}{value[:80]} is not a reward: name a `Reward` class or a function of "
        "`completions`; give options of a function by {class_path: FunctionReward, init_args: "
        "{function: my_module.f, weight: 1.0}}"
    )
