"""`RewardModel` against the forward pass of its classifier, one text at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, RewardModel
from tests.support.builders import seeded

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
ROWS = [Completion(p, t, "", 2, True, {}) for p, t in [("1+1=", "2"), ("12+345=", "7"), ("3=", "")]]


@pytest.fixture(params=[None, TEMPLATE], ids=["text", "chat"])
def folder(tmp_path: Path, tiny_policy, request) -> Path:
    """A classifier of two outputs with the tokenizer of the tiny policy."""
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = request.param
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
    )
    network = LlamaForSequenceClassification(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=seeded(weight.numel()))
    network.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_scores_are_those_of_single_texts(folder: Path) -> None:
    reward = RewardModel(str(folder), label=1, batch_size=2)
    reward.check(8)
    scores = reward.score(ROWS)
    network, tokenizer = reward._network, reward._tokenizer
    assert not network.training
    for row, score in zip(ROWS, scores, strict=True):
        text = row.prompt + row.text
        if tokenizer.chat_template:
            text = f"u:{row.prompt};a:{row.text};"
        special = not tokenizer.chat_template
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
        assert score == pytest.approx(network(ids).logits[0, 1].item(), abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 3
    assert reward.score(ROWS) == scores


def test_earlier_messages_of_a_chat_count(folder: Path) -> None:
    chat = ({"role": "system", "content": "9"}, {"role": "user", "content": ROWS[0].prompt})
    reward = RewardModel(str(folder))
    longer, plain = reward.score([replace(ROWS[0], messages=chat), ROWS[0]])
    assert (longer != pytest.approx(plain, abs=1e-5)) == bool(reward._tokenizer.chat_template)


def test_long_texts_lose_their_beginning(folder: Path) -> None:
    reward = RewardModel(str(folder), max_tokens=3)
    rows = [Completion(prompt, "345", "", 2, True, {}) for prompt in ("1+1=", "999=")]
    first, second = reward.score(rows)
    assert first == second


def test_mistakes_are_found_before_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`RewardModel.label` is 2, and the model .* has 2 outputs"):
        RewardModel(str(folder), label=2).check(8)
    with pytest.raises(UserError, match="none"):
        RewardModel(str(tmp_path / "none")).check(8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "a.b"}}))
    with pytest.raises(UserError, match="code in model folders is never run"):
        RewardModel(str(folder)).check(8)
