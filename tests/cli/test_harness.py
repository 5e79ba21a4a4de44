"""lm-evaluation-harness on a loaded model, with a stand-in for the package."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from lightning_mpo.cli.harness import named_tasks, run_harness
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

    def evaluate(model, tasks, limit, apply_chat_template, task_manager):
        calls.append((model, tasks, limit, apply_chat_template, task_manager))
        if tasks == ["nothing"]:
            raise KeyError("Missing task\nnothing")
        return {"results": RESULTS}

    package, huggingface = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = evaluate
    huggingface.HFLM = lambda **options: options
    manager = ModuleType("lm_eval.tasks")
    manager.TaskManager = lambda include_path: include_path
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
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
    ((model, tasks, limit, chat, folders),) = calls
    assert (model["pretrained"], tasks, limit, chat) == ("network", ["gsm8k"], 7, True)
    run_harness(policy(), ["gsm8k"], None, chat=True)
    assert calls[1][2:] == (None, False, None), "a model without a template gets none"
    assert folders is None


def test_a_task_may_be_a_file(calls, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("dataset_path: json\ntask: local_sums\ndoc_to_text: !function a.b\n")
    run_harness(policy(), ["gsm8k", str(file)], None, chat=True)
    assert calls[0][1] == ["gsm8k", "local_sums"]
    assert calls[0][4] == [str(tmp_path)]
    file.write_text("dataset_path: json\n")
    with pytest.raises(UserError, match=r"mine.yaml`: the file has no line `task: NAME`"):
        named_tasks([str(file)])
    with pytest.raises(UserError, match=r"`--harness nowhere.yaml`: there is no such file"):
        named_tasks(["nowhere.yaml"])


def test_without_tasks_it_is_not_imported():
    assert run_harness(policy(), [], None, chat=True) == {}


def test_failures_are_one_line(calls):
    with pytest.raises(UserError, match=r"the harness failed \(KeyError: 'Missing task"):
        run_harness(policy(), ["nothing"], None, chat=True)
    with pytest.raises(UserError, match="takes causal models"):
        run_harness(policy(masked=True), ["gsm8k"], None, chat=True)
