"""`lightning-mpo evaluate` and `compare`: answers, tables, a resume, and mistakes in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_mpo.cli import benchmarks, evaluate
from lightning_mpo.export.usage import Usage
from lightning_mpo.policies import CausalPolicy, TinyPolicy

ROWS = [
    {"prompt": f"{a}+{b}=", "target": f"{a + b}", "level": a % 2, "note": "n" * 99}
    for a in range(5)
    for b in (0, 7)
]
SUMS = """
data:
  class_path: Table
  init_args: {train: train.jsonl, validation: held_out.jsonl, chat_template: false}
rollout: {rewards: [{class_path: MathAnswer, init_args: {require_finished: false}}]}
"""
PLAIN = ["--model", "out", "--benchmarks", "sums.yaml", "--batch_size", 4, "--accelerator", "cpu"]


@pytest.fixture
def folder(tiny_folder, here, monkeypatch) -> Path:
    """An exported model and a benchmark in the working directory."""
    shutil.copytree(tiny_folder, here / "out")
    Usage(temperature=1.5, max_new_tokens=5).write(Path("out"))
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (here / "held_out.jsonl").write_text("".join(lines))
    (here / "train.jsonl").write_text(json.dumps({"prompt": "9+9=", "target": "18"}) + "\n")
    (here / "sums.yaml").write_text(SUMS)
    return here


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_all_problems_are_answered_and_an_ended_evaluation_goes_on(folder, call, capsys):
    assert call("evaluate", *PLAIN, "--completions", 4) == 0
    printed = capsys.readouterr().out
    assert "10 of 10 problems" in printed
    assert "sums by level" in printed
    about, *problems = lines("evaluation/sums.jsonl")
    assert about["problems"] == 10
    assert about["settings"]["temperature"] == 1.5
    assert [part["prompt"] for part in problems] == [row["prompt"] for row in ROWS]
    assert problems[3]["columns"] == {"prompt": "1+7=", "target": "8", "level": 1}
    assert all(len(part["samples"]) == 4 for part in problems)
    (result,) = json.loads(Path("evaluation/summary.json").read_text())["benchmarks"].values()
    right = [sample["right"] for part in problems for sample in part["samples"]]
    assert result["pass_at_1"] == pytest.approx(sum(right) / 40)
    assert {"pass_at_4", "maj_at_4", "length", "truncated", "answered"} <= result.keys()
    # killed within the third batch
    whole, summary = (
        Path("evaluation", name).read_bytes() for name in ("sums.jsonl", "summary.json")
    )
    Path("evaluation/.sums.jsonl.part").write_bytes(whole[:-10])
    Path("evaluation/sums.jsonl").unlink()
    assert call("evaluate", *PLAIN, "--completions", 4) == 0
    assert "goes on behind 8 of 10 problems" in capsys.readouterr().out
    assert Path("evaluation/sums.jsonl").read_bytes() == whole
    assert Path("evaluation/summary.json").read_bytes() == summary
    # whole: nothing is sampled again
    assert call("evaluate", *PLAIN, "--completions", 4) == 0
    assert "all 10 problems were answered before" in capsys.readouterr().out
    # the answers of another model of this name
    network = CausalPolicy("out")
    network.build(device=evaluate.torch.device("cpu"), reference=False)
    network.network.lm_head.weight.data.mul_(1.01)
    network.network.save_pretrained("out")
    assert call("evaluate", *PLAIN, "--completions", 4) == 2
    assert "answers of another evaluation (weights: '" in capsys.readouterr().err


def test_a_checkpoint_is_compared_with_another_evaluation(folder, call, capsys):
    assert call("fit", "-c", "base.yaml") == 0
    run = ["-c", "base.yaml", "--checkpoint", "run/checkpoints/last.ckpt", "--accelerator", "cpu"]
    run += ["--benchmarks", "sums.yaml", "--limit", 6, "--greedy"]
    assert call("evaluate", *run, "--out", "first") == 0
    assert len(lines("first/sums.jsonl")) == 1 + 6
    assert call("evaluate", *run, "--out", "second", "--against", "first", "--by", "level") == 0
    assert "difference" in capsys.readouterr().out
    (result,) = json.loads(Path("second/summary.json").read_text())["benchmarks"].values()
    assert result["difference"]["pass_at_1"] == 0
    assert call("compare", "first/sums.jsonl", "second/sums.jsonl", "--by", "level") == 0
    assert "level 1" in capsys.readouterr().out
    assert call("compare", "first/sums.jsonl", "second/sums.jsonl", "--k", 2) == 2
    assert "`--k` must hold numbers from 1 to 1" in capsys.readouterr().err
    assert call("evaluate", *PLAIN, "--greedy", "--limit", 6, "--max_new_tokens", 6) == 0
    assert call("compare", "first/sums.jsonl", "evaluation/sums.jsonl") == 2
    assert "first/sums.jsonl is of another model (llama" in capsys.readouterr().err
    assert call("compare", "first/sums.jsonl", "evaluation/sums.jsonl", "--other-model") == 0


MISTAKES = {
    "needs --model or --checkpoint": ["--benchmarks", "sums.yaml"],
    "`evaluate` needs --benchmarks": ["--model", "out"],
    "no configuration file or recipe 'gsm9k'; did you mean `gsm8k`?": [*PLAIN[:3], "gsm9k"],
    "'grpo' is no benchmark: it has the section `model`": [*PLAIN[:3], "grpo"],
    "`--k` must hold numbers from 1 to 4, the completions of each problem, got 8": [
        *PLAIN, "--completions", 4, "--k", 1, 8,
    ],
    "'out' has no chat template, and the benchmark 'chats'": [*PLAIN[:3], "chats.yaml"],
    "`--harness` needs lm-evaluation-harness, which is not installed": [*PLAIN, "--harness", "gsm8k"],
    "`--greedy` gives equal completions": [*PLAIN, "--greedy", "--completions", 2],
    "there is no file of answers nowhere/sums.jsonl": [*PLAIN, "--against", "nowhere"],
    "`--by size`: no benchmark has this column": [*PLAIN, "--by", "level", "size"],
    "`--limit` must be at least 1, got 0": [*PLAIN, "--limit", 0],
    "`--dtype` belongs to --model": ["--checkpoint", "x.ckpt", *PLAIN[2:], "--dtype", "bfloat16"],
    "has no option `--limits`": [*PLAIN, "--limits", 3],
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_before_a_model_is_loaded(folder, call, capsys, monkeypatch, message):
    def never(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(CausalPolicy, "load_network", never)
    monkeypatch.setattr(TinyPolicy, "load_network", never)
    find = importlib.util.find_spec
    absent = lambda name, *more: None if name == "lm_eval" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    Path("chats.yaml").write_text(SUMS.replace("chat_template: false", "chat_template: true"))
    assert call("evaluate", *MISTAKES[message]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("evaluation").exists()


def test_weights_are_loaded_in_the_type_of_the_option(folder, call, monkeypatch):
    loaded = []
    fingerprint = evaluate.fingerprint

    def recorded(policy):
        loaded.append({weight.dtype for weight in policy.parameters()})
        return fingerprint(policy)

    monkeypatch.setattr(evaluate, "fingerprint", recorded)
    assert call("evaluate", *PLAIN, "--limit", 2) == 0
    assert call("evaluate", *PLAIN, "--limit", 2, "--dtype", "bfloat16", "--out", "narrow") == 0
    assert loaded == [{evaluate.torch.float32}, {evaluate.torch.bfloat16}]
    # a file of the other type is not continued
    assert call("evaluate", *PLAIN, "--limit", 2, "--dtype", "bfloat16") == 2


def test_plain_prompts_need_no_template(folder):
    Path("chats.yaml").write_text(SUMS.replace(", chat_template: false", ""))
    assert benchmarks.read_benchmark("chats.yaml", None, plain=False).data.chat_template
    assert not benchmarks.read_benchmark("chats.yaml", None, plain=True).data.chat_template
    assert len(benchmarks.read_benchmark("sums.yaml", 3, plain=False).rows) == 3


def test_plain_prompts_of_data_that_are_made_of_others(folder):
    """The option is one of the data below."""
    chats = yaml.safe_load(SUMS.replace(", chat_template: false", ""))
    table, both = chats["data"], {"base": chats["data"], "others": [chats["data"]]}
    for kind, arguments in (("Scaffolded", {"base": table}), ("Mixed", both)):
        content = chats | {"data": {"class_path": kind, "init_args": arguments}}
        Path("made.yaml").write_text(yaml.safe_dump(content))
        assert benchmarks.read_benchmark("made.yaml", None, plain=False).data.chat_template
        assert not benchmarks.read_benchmark("made.yaml", None, plain=True).data.chat_template
    # code has no template to turn off
    code = {"class_path": "CodeLines", "init_args": {"paths": ["code"]}}
    Path("code.yaml").write_text(yaml.safe_dump(chats | {"data": code}))
    assert not benchmarks.read_benchmark("code.yaml", None, plain=True).data.chat_template
