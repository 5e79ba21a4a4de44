"""lm-evaluation-harness on a loaded model, with a stand-in for the package."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from lightning_mpo.cli.harness import run_harness
from lightning_mpo.errors import UserError

RESULTS = {
    "gsm8k": {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.05,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": "N/A",
    }
}


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Put a stand-in in place of the package, and return the calls of it."""
    calls: list[tuple] = []

    def evaluate(model, tasks, limit, apply_chat_template):
        calls.append((model, tasks, limit, apply_chat_template))
        if tasks == ["nothing"]:
            raise KeyError("Missing task\nnothing")
        return {"results": RESULTS}

    package, huggingface = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = evaluate
    huggingface.HFLM = lambda **options: options
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    return calls


def policy(template=None, masked=False):
    return SimpleNamespace(
        masked=masked, network="network", tokenizer=SimpleNamespace(chat_template=template)
    )


def test_its_figures_have_intervals(calls):
    figures = run_harness(policy("template"), ["gsm8k"], 7, chat=True)
    assert figures == {
        "harness gsm8k": {
            "exact_match (strict-match)": 0.25,
            "exact_match (strict-match)_interval": pytest.approx([0.152, 0.348]),
            "exact_match (flexible-extract)": 0.5,
        }
    }
    ((model, tasks, limit, chat),) = calls
    assert (model["pretrained"], tasks, limit, chat) == ("network", ["gsm8k"], 7, True)
    run_harness(policy(), ["gsm8k"], None, chat=True)
    assert calls[1][2:] == (None, False), "a model without a template gets none"


def test_without_tasks_it_is_not_imported():
    assert run_harness(policy(), [], None, chat=True) == {}


def test_failures_are_one_line(calls):
    with pytest.raises(UserError, match=r"the harness failed \(KeyError: 'Missing task"):
        run_harness(policy(), ["nothing"], None, chat=True)
    with pytest.raises(UserError, match="takes causal models"):
        run_harness(policy(masked=True), ["gsm8k"], None, chat=True)
