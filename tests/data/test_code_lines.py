"""`CodeLines`: prompts are the file before a line, and tokens are those of its pieces."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.data.code_files import lines_of, read_corpus
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.data.code_tokens import CodeTokens
from lightning_mpo.errors import UserError
from tests.support.code_corpus import tiny, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "code")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny().tokenizer


def lines(folder, **options) -> CodeLines:
    return CodeLines([str(folder)], **({"validation_share": 0.3, "split_seed": 1} | options))


def test_a_prompt_is_the_file_before_the_line(folder, tokenizer):
    data = lines(folder, max_prompt_tokens=120)
    data.connect(tokenizer)
    rows = [*data.splits.train, *data.splits.validation]
    assert len(rows) == 12 * 16
    for row in rows:
        file = lines_of((folder / row.extra["file"]).read_text())
        line = file[row.extra["number"] - 1]
        before = "".join(file[: row.extra["number"] - 1])
        assert row.extra["line"] == line
        assert row.target == line.strip()
        cut = row.prompt.removesuffix(row.extra["indentation"])
        assert before.endswith(cut)
        # cut at the start of a line, and one more piece would be too long
        rest = before.removesuffix(cut)
        assert rest.endswith("\n") or not rest
        assert len(row.prompt) <= 120
        if rest:
            assert len(row.prompt) + len(lines_of(rest.rstrip("\n"))[-1]) > 119


@pytest.mark.parametrize("longest", [40, 90, 400])
def test_prompts_of_a_group_begin_at_one_line(folder, tokenizer, longest):
    data = lines(folder, max_prompt_tokens=longest)
    data.connect(tokenizer)
    grown = 0
    for file in read_corpus([str(folder)]).files:
        rows, groups = data.rows_of(file), data.rows_by_start(file)
        numbers = [row.extra["number"] for group in groups for row in group]
        assert numbers == [row.extra["number"] for row in rows]
        alone = {row.extra["number"]: row.prompt for row in rows}
        for group in groups:
            before = [row.prompt.removesuffix(row.extra["indentation"]) for row in group]
            for row, text in zip(group, before, strict=True):
                assert text
                assert text.startswith(before[0]), "one beginning"
                assert alone[row.extra["number"]].endswith(row.prompt), "no longer than alone"
            grown += len(group) > 1
            is_cut = before[0].count("\n") < group[0].extra["number"] - 1
            one_line = before[0].strip().count("\n") == 0
            assert not is_cut or one_line or len(before[0]) <= longest // 2
    assert grown


def test_ids_are_those_of_the_pieces(folder, tokenizer):
    data = lines(folder)
    data.connect(tokenizer)
    batch = data.prompts(0, 8)
    for row, ids, mask in zip(batch.rows, batch.input_ids_PS, batch.attention_mask_PS, strict=True):
        before, indent, blank, line = (
            row.extra[f"{name}_ids"] for name in ("before", "indent", "blank", "line")
        )
        assert ids[mask].tolist() == [*before, *indent]
        assert len(blank) == len(row.extra["indentation"]), "a blank is a token"
        assert not mask[: int((~mask).sum())].any(), "padded on the left"
        assert tokenizer.decode(ids[mask]) == row.prompt
        assert tokenizer.decode([*blank, *line]) == row.extra["line"]
    again = lines(folder)
    again.connect(tokenizer)
    assert torch.equal(again.prompts(0, 8).input_ids_PS, batch.input_ids_PS)
    # the line has a place behind prompt and response
    longest = max(
        len(row.prompt) + len(row.extra["line"])
        for row in (*data.splits.train, *data.splits.validation)
    )
    assert data.longest_prompt == longest


def test_whole_files_are_held_out(folder):
    data = lines(folder)
    names = [
        {row.extra["file"] for row in rows} for rows in (data.splits.train, data.splits.validation)
    ]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
    # a copy of a file is on the same side
    (folder / "copy.py").write_text((folder / sorted(names[1])[0]).read_text())
    try:
        assert "copy.py" in {row.extra["file"] for row in lines(folder).splits.validation}
    finally:
        (folder / "copy.py").unlink()


def test_lines_that_do_not_fit_are_counted(folder, tokenizer, caplog):
    data = lines(folder, max_line_tokens=25)
    with caplog.at_level("INFO"):
        data.connect(tokenizer)
    rows = [*data.splits.train, *data.splits.validation]
    assert {len(row.extra["line"]) <= 25 for row in rows} == {True}
    assert "over `data.max_line_tokens`" in caplog.text
    with pytest.raises(
        UserError, match=r"no line to train on that fits \(skipped: .*over `data.max"
    ):
        lines(folder, max_line_tokens=3).connect(tokenizer)
    with pytest.raises(UserError, match="behind a line over `data.max_prompt_tokens`"):
        lines(folder, max_prompt_tokens=9).connect(tokenizer)


def test_unknown_characters_are_counted(tmp_path, tokenizer, caplog):
    folder = write_corpus(tmp_path / "code")
    (folder / "other.py").write_text("first = 1\nsecond_name = 'ö'\nthird_name = 3\n")
    data = lines(folder)
    with caplog.at_level("INFO"):
        data.connect(tokenizer)
    assert "2 with characters that the tokenizer does not know" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": []}, "`CodeLines.paths` must be a list"),
        ({"lines_per_file": 0}, "`CodeLines.lines_per_file` must be at least 1, got 0"),
        ({"validation_share": 1.0}, r"`CodeLines.validation_share` must be in \[0, 1\), got 1.0"),
        ({"max_line_tokens": 0}, "`CodeLines.max_line_tokens` must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        CodeLines(**({"paths": ["."]} | options))


def test_no_file_is_held_out(folder):
    with pytest.raises(UserError, match="no line to validate on; give more files"):
        _ = lines(folder, validation_share=1e-9).splits


def test_a_tokenizer_that_writes_spaces_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0, "def": 1, "f(x):": 2, "return": 3, "x": 4}, "?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="cannot put tokens of pieces of code together"):
        CodeTokens(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"))
