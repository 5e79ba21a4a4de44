"""Frozen rollouts: what is read is what was written, and anything else is refused in one line."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import date

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rollout import load_rollout, save_rollout
from lightning_mpo.types import PromptRow
from tests.support.builders import make_rollout


def full_rollout():
    rollout = make_rollout([3, 5], [4, 1, 2, 6], support=3, slots=True)
    rows = [
        PromptRow("1+1=", "2"),
        PromptRow("ü\n", "", solution="s", extra={"level": 3, "tags": ["a"]}),
    ]
    return replace(
        rollout,
        texts=("a", "", "ö", '"'),
        rows=(rows[0], rows[0], rows[1], rows[1]),
        kept_mass_BT=torch.rand(4, 6),
        candidates_BTK=torch.randint(9, (4, 6, 2), dtype=torch.int32),
        candidate_logprobs_BTK=torch.tensor([-0.5, -torch.inf]).repeat(4, 6, 1),
    )


def test_what_is_read_is_what_was_written(tmp_path):
    rollout, path = full_rollout(), tmp_path / "new" / "frozen.safetensors"
    twice = torch.randn(4, 6)
    save_rollout(path, rollout, old_BT=twice, new_BT=twice, one=torch.tensor(3.0))
    again, others = load_rollout(path)
    for item in fields(rollout):
        before, after = getattr(rollout, item.name), getattr(again, item.name)
        if isinstance(before, Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        else:
            assert before == after
    assert {name: value.shape for name, value in others.items()} == {
        "old_BT": (4, 6),
        "new_BT": (4, 6),
        "one": (),
    }
    assert torch.equal(others["new_BT"], twice)


def test_fields_that_are_absent_stay_absent(tmp_path):
    save_rollout(tmp_path / "frozen", make_rollout([3], [2, 1]))
    again, others = load_rollout(tmp_path / "frozen")
    assert again.support_BTK is None
    assert again.texts == again.rows == ()
    assert others == {}


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "frozen.safetensors"
    save_rollout(path, full_rollout())
    before = path.read_bytes()

    def half(state, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_rollout(path, full_rollout())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_rows_that_json_cannot_hold_are_refused(tmp_path):
    rollout = replace(
        make_rollout([3], [2]), rows=(PromptRow("p", "t", extra={"day": date(2026, 1, 1)}),)
    )
    with pytest.raises(UserError, match="a prompt row cannot be written to .*date"):
        save_rollout(tmp_path / "frozen", rollout)
    assert not list(tmp_path.iterdir())


def broken(tmp_path, how):
    path = tmp_path / "frozen.safetensors"
    save_rollout(path, full_rollout())
    state, metadata = load_file(path), {"rollout": '{"texts": [], "rows": []}'}
    if how == "absent":
        path.unlink()
    elif how == "text":
        path.write_text("hello")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "weights":
        save_file({"weight": torch.zeros(2)}, path)
    elif how == "json":
        save_file(state, path, metadata={"rollout": "{"})
    elif how == "row":
        save_file(state, path, metadata={"rollout": '{"texts": [], "rows": [{"prompt": 1}]}'})
    elif how == "field":
        save_file(
            {name: value for name, value in state.items() if "finish" not in name},
            path,
            metadata=metadata,
        )
    elif how == "rows":
        save_file(state | {"rollout.finish_B": torch.zeros(3)}, path, metadata=metadata)
    elif how == "mask":
        save_file(state | {"rollout.response_mask_BT": torch.ones(4, 6)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "cannot be read"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("weights", "its metadata has no texts and prompt rows"),
        ("json", "its metadata has no texts and prompt rows"),
        ("row", "its metadata has no texts and prompt rows"),
        ("field", "finish_B is missing"),
        ("rows", "finish_B has 3 rows, group_B has 4"),
        ("mask", "response_mask_BT is not bool"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path, how, message):
    path = broken(tmp_path, how)
    with pytest.raises(UserError, match=message) as caught:
        load_rollout(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    path, own, other = tmp_path / "frozen", TinyPolicy("abc").tokenizer, TinyPolicy("acb").tokenizer
    save_rollout(path, make_rollout([3], [2, 1]), tokenizer=own)
    load_rollout(path, own)
    load_rollout(path)
    with pytest.raises(UserError, match="are ids of another tokenizer than the policy's"):
        load_rollout(path, other)  # as many tokens, other ids
    save_rollout(path, make_rollout([3], [2, 1]))
    load_rollout(path, other)  # nothing is known of an unmarked file
