"""`CommentedLines`: comments are demonstrations of thoughts, and other lines of acts."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_mpo import SupervisedWarmup
from lightning_mpo.data.code_files import code_file, read_corpus
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.data.commented_lines import CommentedLines, comment_of
from lightning_mpo.errors import UserError
from tests.support.code_corpus import tiny

CODE = """import os
# names of all files
names = os.listdir(".")

def long(name, more):
    # the first of a block
    # the last of a block
    size = len(name)
    # x = 1
    other = size + 1
        # another column
    third = other + 1
    #without a blank
    fourth = third + 1
    # is it longer than it should be
    return fourth > 20 + len(more)

def short(name, more):
    return not long(name, more)
"""
COMMENTS = {3: "# names of all files\n", 16: "# is it longer than it should be\n"}
"""Comments that can be used, by the number of the line behind them."""


@pytest.fixture
def folder(tmp_path) -> Path:
    for n in range(8):
        (tmp_path / f"file_{n}.py").write_text(f"index = {n}\n{CODE}")
    return tmp_path


def made(folder: Path, **options) -> CommentedLines:
    options = {"validation_share": 0.3, "split_seed": 1, **options}
    data = CommentedLines([str(folder)], **options)
    data.connect(tiny().tokenizer)
    return data


def test_comments_that_can_be_used():
    file = code_file(CODE.encode(), "a.py")
    comments = {i + 1: comment_of(file, i) for i in file.starts if i}
    assert {number: text for number, text in comments.items() if text} == COMMENTS


def test_demonstrations_are_comments_and_acts_in_equal_number(folder):
    data = made(folder, max_comment_tokens=40)
    rows = [*data.splits.train, *data.splits.validation]
    commented = [row for row in rows if row.solution != "\n"]
    assert len(commented) == 16
    assert len(rows) == 32
    for row in rows:
        file = (folder / row.extra["file"]).read_text()
        before = row.prompt.removesuffix(row.extra["indentation"])
        if row.solution == "\n":  # the prompt ends in front of the line
            assert f"{before}{row.extra['line']}" in file
        else:  # and here in front of the comment
            assert COMMENTS[row.extra["number"] - 1] == row.solution
            assert f"{row.prompt}{row.solution}{row.extra['line']}" in file


def test_thoughts_are_written_in_front_of_all_lines_of_a_file(folder):
    data, every = made(folder), CodeLines([str(folder)], validation_share=0.3, split_seed=1)
    every.connect(tiny().tokenizer)
    file = read_corpus([str(folder)]).files[0]
    numbers = [row.extra["number"] for row in every.rows_of(file)]
    assert len(numbers) > 5
    assert [row.extra["number"] for row in data.rows_of(file)] == numbers


def test_a_demonstration_ends_with_its_line(folder):
    data = made(folder, max_comment_tokens=40)
    rows = data.splits.train
    demonstrations = data.solutions(rows)
    texts = tiny().token_texts
    for row, ids, mask in zip(
        rows, demonstrations.responses_BT, demonstrations.response_mask_BT, strict=True
    ):
        assert "".join(texts[i] for i in ids[mask].tolist()) == row.solution


def test_long_comments_are_left_out_and_counted(folder, caplog):
    data = made(folder, max_comment_tokens=21)
    assert {row.solution for row in data.splits.train} == {"\n", COMMENTS[3]}
    assert "8 behind a comment over `data.max_comment_tokens`" in caplog.text


@pytest.mark.parametrize(
    ("positions", "canvas", "message"),
    [
        (64, None, "more than the model's 64 positions; lower `data.max_prompt_tokens`"),
        (None, 16, "demonstrations for a causal policy"),
    ],
)
def test_mistakes(folder, positions, canvas, message):
    with pytest.raises(UserError, match=message):
        made(folder).check_solutions(positions, canvas)


def test_a_policy_imitates_them(folder):
    """The loss of held-out demonstrations falls."""
    L.seed_everything(0)
    module = SupervisedWarmup(
        tiny(), batch_size=8, optimizer=lambda w: torch.optim.AdamW(w, lr=2e-2)
    )
    trainer = L.Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
        val_check_interval=12, check_val_every_n_epoch=None, num_sanity_val_steps=1,
    )  # fmt: skip
    losses: list[float] = []
    module.on_validation_epoch_end = lambda: losses.append(
        float(trainer.callback_metrics["val/loss"])
    )
    trainer.fit(module, datamodule=made(folder, max_comment_tokens=40))
    assert losses[-1] < 0.8 * losses[0]
