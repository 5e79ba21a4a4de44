"""Runs of two updates on Parquet files: questions like those of GSM8K, and chats."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from lightning_mpo import cli
from lightning_mpo.cli import parser
from lightning_mpo.policies import tiny
from tests.support.commands import write
from tests.support.configurations import BASE

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*=?.,:;#<>$' \n"
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a: "


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Train for two updates; `rows` are written to `rows.parquet`."""
    runs: list[parser.CLI] = []
    monkeypatch.setattr(parser.CLI, "after_fit", lambda self: runs.append(self), raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)

    def run(rows, **options):
        parquet.write_table(pa.Table.from_pylist(rows), "rows.parquet")
        policy = {"class_path": "TinyPolicy", "init_args": {"characters": LETTERS, "max_length": 512,
                  "hidden_size": 32, "layers": 1, "heads": 2}}  # fmt: skip
        overlay = {
            "model": {"init_args": {"policy": policy}},
            "data": {"class_path": "Table", "init_args": {"train": "rows.parquet"} | options},
            "trainer": {"max_steps": 2},
        }
        write(tmp_path / "table.yaml", overlay)
        monkeypatch.setattr(
            sys, "argv", ["lightning-mpo", "fit", "-c", "base.yaml", "-c", "table.yaml"]
        )
        assert cli.run() == 0
        assert runs[-1].trainer.global_step == 2
        return runs[-1].datamodule

    return run


def test_questions_with_templates_and_examples(fit):
    rows = [
        {"question": f"Tom has {n} eggs. He buys {n}. How many?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}
        for n in range(1, 20)
    ]  # fmt: skip
    data = fit(
        rows,
        prompt="Question: {{ question }}\nAnswer: ",
        target="{{ answer.split('####')[-1] }}",
        solution="answer",
        few_shot=2,
        chat_template=False,
    )
    row = data.splits.train[0]
    assert row.prompt.startswith("Question: Tom has")
    assert row.target == str(2 * int(row.prompt.split()[3]))
    (ids,) = data.encode([row]).input_ids_PS
    text = data._renderer.tokenizer.decode(ids)
    assert text.count("Question: ") == 3
    assert text.endswith(row.prompt)


def test_chats(fit, monkeypatch):
    made = tiny.character_tokenizer

    def with_template(*arguments):
        tokenizer = made(*arguments)
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    monkeypatch.setattr(tiny, "character_tokenizer", with_template)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}"}],
         "target": 2 * n}
        for n in range(20)
    ]  # fmt: skip
    data = fit(rows, few_shot=1, max_prompt_tokens=24, overlong="cut")
    (ids,) = data.encode(data.splits.train[:1]).input_ids_PS
    text = data._renderer.tokenizer.decode(ids)
    assert text.count("u: ") == 2
    assert text.endswith("\na: ")
