"""Prompt files: what they serve, and which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mpo.data import PromptFile
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy


def write(folder: Path, *lines: str | bytes) -> str:
    path = folder / "prompts.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return str(path)


def test_lines_in_order_with_their_other_columns(tmp_path):
    data = PromptFile(
        write(tmp_path, '{"prompt": "1+1=", "id": 4}', "", '{"id": 5, "prompt": "2+2="}')
    )
    rows = data.validation_rows
    assert [row.prompt for row in rows] == ["1+1=", "2+2="]
    assert [dict(row.extra) for row in rows] == [
        {"prompt": "1+1=", "id": 4},
        {"prompt": "2+2=", "id": 5},
    ]
    assert not data.judged


def test_a_target_may_be_named(tmp_path):
    data = PromptFile(write(tmp_path, '{"q": "1+1=", "a": 2, "id": 1}'), prompt="q", target="a")
    assert data.judged
    assert data.validation_rows[0].target == "2"
    assert dict(data.validation_rows[0].extra) == {"q": "1+1=", "a": 2, "id": 1}, (
        "columns keep their names"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "1"', r'line 3 of .*prompts.jsonl is not JSON, such as \{"prompt": "…"\}'),
        (b'{"prompt": "\xff"}', "line 3 of .* is not JSON"),
        ('["1"]', "line 3 of .* must be an object with columns, got list"),
        (
            '{"promt": "1"}',
            "line 3 of .* has no 'prompt'; its columns are 'promt'; did you mean 'promt'",
        ),
        ('{"prompt": 1}', "line 3 of .*: 'prompt' must be text, got int"),
        ('{"prompt": null}', "line 3 of .*: 'prompt' is null"),
        ('{"prompt": ""}', "line 3 of .*: 'prompt' is empty"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, said):
    with pytest.raises(UserError, match=said):
        PromptFile(write(tmp_path, '{"prompt": "1"}', "", line)).setup("predict")


def test_no_file_and_no_prompts(tmp_path):
    with pytest.raises(UserError, match="`data.path`: there is no file 'gone.jsonl'"):
        PromptFile("gone.jsonl").setup("predict")
    with pytest.raises(UserError, match=r"holds no prompt; write one JSON object a line"):
        PromptFile(write(tmp_path, "", "")).setup("predict")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_it_serves_predictions_alone(tmp_path, stage):
    with pytest.raises(UserError, match=f"`PromptFile` is for `predict`, not for `{stage}`"):
        PromptFile(write(tmp_path, '{"prompt": "1"}')).setup(stage)


@pytest.mark.parametrize(
    ("given", "has", "applied"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_the_chat_template_is_that_of_the_tokenizer(tmp_path, given, has, applied):
    data = PromptFile(write(tmp_path, '{"prompt": "1+1="}'), chat_template=given)
    tokenizer = TinyPolicy("0123456789+=").tokenizer
    if has:
        tokenizer.chat_template = "{% for m in messages %}={{ m['content'] }}{% endfor %}"
    data.connect(tokenizer)
    ids = data.encode(data.validation_rows).input_ids_PS[0].tolist()
    assert tokenizer.decode(ids) == ("=1+1=" if applied else "1+1=")
