"""lm-evaluation-harness on the evaluated model, as an optional extra."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy


def check_harness() -> None:
    """Refuse `--harness` without the package.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "`--harness` needs lm-evaluation-harness, which is not installed: run "
            "pip install 'lightning-mpo[harness]'"
        )


def run_harness(
    policy: Policy, tasks: Sequence[str], limit: int | None, chat: bool
) -> dict[str, dict[str, Any]]:
    """Return the figures of the harness by task, each with its interval of two standard errors.

    The harness loads the problems, writes prompts, samples greedily and judges by its own rules.

    Args:
        policy: a causal one, with its weights.
        tasks: names of tasks, such as `gsm8k`, or YAML files of tasks.
        limit: number of problems of each task; None: all.
        chat: whether the chat template is applied.

    Raises:
        UserError: the policy is of another kind, or the harness fails.
    """
    if not tasks:
        return {}
    if policy.masked:
        raise UserError("`--harness` takes causal models, and this one is masked")
    names, folders = named_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chat = chat and bool(policy.tokenizer.chat_template)
    try:
        model = HFLM(pretrained=policy.network, tokenizer=policy.tokenizer, batch_size=8)
        manager = TaskManager(include_path=folders or None)
        outcome = lm_eval.simple_evaluate(
            model, tasks=names, limit=limit, apply_chat_template=chat, task_manager=manager
        )
    except Exception as error:  # unknown task, no network, a missing reward package: many types
        line = " ".join(str(error).split())[:200]
        raise UserError(f"the harness failed ({type(error).__name__}: {line})") from error
    return {f"harness {task}": _figures(values) for task, values in outcome["results"].items()}


def named_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of tasks, and the folders of those that are files.

    Raises:
        UserError: a file is not there, or names no task.
    """
    names, folders = [], []
    for task in tasks:
        path = Path(task).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        if not path.is_file():
            raise UserError(f"`--harness {task}`: there is no such file")
        name = re.search(
            r"^task:\s*['\"]?([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        if name is None:
            raise UserError(f"`--harness {task}`: the file has no line `task: NAME`")
        names.append(name[1])
        folders.append(str(path.resolve().parent))
    return names, folders


def _figures(values: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a task, with intervals."""
    figures: dict[str, Any] = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if not isinstance(value, float) or name.endswith("_stderr"):
            continue
        shown = f"{name} ({kind})" if kind not in ("", "none") else name
        figures[shown] = value
        error = values.get(f"{name}_stderr,{kind}")
        if isinstance(error, float):
            figures[f"{shown}_interval"] = [value - 1.96 * error, value + 1.96 * error]
    return figures
