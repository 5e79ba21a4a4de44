"""How probable a policy finds a comment, against the network's own probabilities."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
from tests.support.code_corpus import CHARACTERS, tiny, write_corpus
from tests.support.ra3_scripts import expected_comments

CONFIG = """
model:
  class_path: PolicyOptimization
  init_args:
    policy: {class_path: TinyPolicy, init_args: {characters: CHARACTERS, hidden_size: 16, layers: 1,
             heads: 2, max_length: 512, initializer_range: 0.4}}
    objective: {advantage: GroupRelative}
data: {class_path: DATA, init_args: {paths: [FOLDER], validation_share: 0.3, split_seed: 1,
       max_prompt_tokens: 60}}
rollout: {rewards: [NextLineLikelihood]}
"""


def test_probabilities_are_those_of_a_naive_loop(tmp_path):
    policy = tiny(hidden_size=32, initializer_range=0.4)
    torch.manual_seed(0)
    policy.build(device=torch.device("cpu"), reference=False)
    folder = write_corpus(tmp_path / "code")
    data = CodeLines([str(folder)], validation_share=0.3, split_seed=1, max_prompt_tokens=60)
    data.connect(policy.tokenizer)
    marks, chances = expected_comments.comment_ids(policy), []
    for row in data.encode(data.splits.validation[:6]).rows:
        measured = expected_comments.expected(policy, row, marks)
        # a character is a token; the indentation is given
        line = row.extra["line"].lstrip(" ")
        ids = policy.tokenizer(row.prompt + line, add_special_tokens=False)["input_ids"]
        first = len(row.prompt)
        assert ids[first] != ids[first - 1] or not row.prompt
        with torch.no_grad():
            rows = policy.network(torch.tensor([ids])).logits[0].double().softmax(-1)
        chance = rows[first - 1, policy.token_texts.index("#")].item()
        total = sum(math.log(rows[i - 1, ids[i]].item()) for i in range(first, len(ids)))
        assert measured["file"] == row.extra["file"]
        assert measured["comment"] == pytest.approx(chance, rel=1e-4)
        assert measured["likelihood"] == pytest.approx(total / len(line), rel=1e-4)
        assert measured["worth"] == pytest.approx(-math.log(1 - chance) / len(line), rel=1e-4)
        chances.append(chance)
    assert max(chances) > 1.01 * min(chances), "the check compares something"


def test_the_command_has_a_row_for_each_policy(tmp_path, capsys):
    folder = write_corpus(tmp_path / "code")
    text = CONFIG.replace("FOLDER", str(folder)).replace("CHARACTERS", json.dumps(CHARACTERS))
    (tmp_path / "run.yaml").write_text(text.replace("DATA", "CodeLines"))
    words = ["-c", str(tmp_path / "run.yaml"), "--checkpoint", "plain=none", "--lines", "3"]
    expected_comments.main([*words, "--out", str(tmp_path / "out")])
    assert "| plain | 3 |" in capsys.readouterr().out
    with (tmp_path / "out" / "expected.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["comment low"]) <= float(row["comment"]) <= float(row["comment high"])
    other = text.replace("DATA", "Arithmetic").replace("[FOLDER]", "[x]")
    (tmp_path / "run.yaml").write_text(other.split("data:")[0] + "data: Arithmetic\n")
    with pytest.raises(UserError, match="-c needs a `CausalPolicy` and the data `CodeLines`"):
        expected_comments.main([*words, "--out", str(tmp_path / "other")])
