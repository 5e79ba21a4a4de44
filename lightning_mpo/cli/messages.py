"""Turns the configuration parser's reports into one line that says what to write instead."""

from __future__ import annotations

import re

from jsonargparse import ArgumentError
from omegaconf.errors import OmegaConfBaseException

from lightning_mpo.cli import reports
from lightning_mpo.cli.verbs import VERBS

CLASS_PATH = r".*Problem with given class_path '([^']+)': "
"""Beginning of a report about the arguments of a class; its group is the class."""
RULES = (
    (r"Group '([^']+)' does not accept option '([^']+)'", reports.no_axis),
    (r"does not accept option '([^']+)'", reports.no_option),
    (r"unrecognized arguments: --([^\s=]+)", reports.no_option),
    (r"unrecognized arguments: ([^-\s]\S*)", reports.lone_word),
    (
        CLASS_PATH + r"(?:Parser key \"[^\"]*\": )?Option '([^']+)' is not accepted",
        reports.no_argument,
    ),
    (
        r"(?=.*callable class: Option '[^']+' is not accepted.*?class_path='([^']+)')"
        r".*Option '([^']+)' is",
        reports.no_argument,
    ),
    (
        r"callable class: the following arguments are required: (\w+).*?class_path='([^']+)'",
        reports.missing_argument_of_factory,
    ),
    (
        r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: "
        r"([\w., ]+?)(?= - |$)",
        reports.ambiguous_class,
    ),
    (r"Expected '([^']+)' to be a subclass of <class '(\w+)'>", reports.other_kind),
    (
        r"Expected an import path or a subclass spec, but got (.+?)(?:\. Got value| - |$)",
        reports.no_class_given,
    ),
    (r".*Import path (\S* ?)does not correspond to a subclass of (\w+)", reports.other_kind),
    (r".*Expected a dot import path string: (\S+)", reports.no_class),
    (CLASS_PATH + r"No module named '([^']+)'", reports.no_module),
    (
        CLASS_PATH + r"(?:module|type object) '[^']+' has no attribute '([^']+)'",
        reports.no_attribute,
    ),
    (
        r"Not of type RewardPath: ((?:reward|there is no file) .+?) Given value type",
        reports.wrong_reward_path,
    ),
    (r"No module named '([^']+)'", reports.no_module_of_factory),
    (r".*Not of type \w+: (.+?) - Expected", reports.not_of_type),
    (r".*Expected a (<class '[^']+'>)\.? Got value: (.+?)(?: - |$)", reports.wrong_type),
    (r".*Expected a typing\.Literal\[([^\]]+)\]\. Got value: (\S+)", reports.no_choice),
    (
        r".*given class_path '([^']+)': the following arguments are required: ([^\s,]+)",
        reports.missing_argument,
    ),
    (r"Key \"([^\"]+)\" is required", reports.missing_option),
    (r"arguments are required: (\S+)", reports.missing_option),
    (r"Not of type RewardPath: .* Given value: (.+)$", reports.no_reward),
    (r"Unable to load config '([^']*)'", reports.no_mapping),
    (
        r".*Not a valid subclass of (\w+)(?!.*Problem with given class_path)",
        reports.not_of_kind,
    ),
    (
        r".*Union subtypes Subtypes: \[(.*?)\] Errors:(?!.*Problem with given class_path)",
        reports.no_member,
    ),
)
"""Pattern of a report, and the function that writes its line; the first match is taken."""


def parser_mistake(error: Exception) -> str | None:
    """Return the line for an error of the parser; None: another error."""
    if isinstance(error, ArgumentError):
        return one_line(str(error))
    if isinstance(error, OmegaConfBaseException):
        verb, _, key = str(error.full_key).partition(".")
        return f"`{key if verb in VERBS else error.full_key}`: {str(error.msg).splitlines()[0]}"
    return None


def one_line(report: str) -> str:
    """Rewrite a report of jsonargparse.

    Example:
        >>> one_line("Subcommand 'fit' does not accept option 'rollout.promts'")
        'no option `rollout.promts`; did you mean `rollout.prompts`?'
    """
    report = " ".join(report.split())
    for pattern, rewrite in RULES:
        match = re.search(pattern, report)
        if match:
            return rewrite(report, *match.groups())
    return reports.innermost(report)
