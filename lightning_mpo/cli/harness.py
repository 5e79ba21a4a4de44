"""lm-evaluation-harness on the evaluated model, as an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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
        tasks: names of tasks, such as `gsm8k`.
        limit: number of problems of each task; None: all.
        chat: whether the chat template is applied.

    Raises:
        UserError: the policy is of another kind, or the harness fails.
    """
    if not tasks:
        return {}
    if policy.masked:
        raise UserError("`--harness` takes causal models, and this one is masked")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    chat = chat and bool(policy.tokenizer.chat_template)
    try:
        model = HFLM(pretrained=policy.network, tokenizer=policy.tokenizer, batch_size=8)
        outcome = lm_eval.simple_evaluate(
            model, tasks=list(tasks), limit=limit, apply_chat_template=chat
        )
    except Exception as error:  # unknown task, no network, a missing reward package: many types
        line = " ".join(str(error).split())[:200]
        raise UserError(f"the harness failed ({type(error).__name__}: {line})") from error
    return {f"harness {task}": _figures(values) for task, values in outcome["results"].items()}


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
