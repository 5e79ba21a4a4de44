"""The gain of thoughts: likelihoods against naive loops, tables by hand, and the command."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.next_line import NextLineLikelihood
from tests.support.code_corpus import tiny
from tests.support.ra3_scripts import gain, lines, tables, thoughts


@pytest.fixture(scope="module")
def policy():
    made = tiny(hidden_size=32, initializer_range=0.4)  # logits that differ clearly
    torch.manual_seed(0)
    made.build(device=torch.device("cpu"), reference=False)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files with one comment in front of a line, two, and none; a copy among them."""
    made = tmp_path_factory.mktemp("code")
    for n in range(24):
        (made / f"file_{n}.py").write_text(
            f"import os\n\n\ndef work_{n}(names):\n"
            f"    # count the names {n}\n    total = len(names) + {n}\n"
            f"    # one\n    # two\n    other = total * {n} + 7\n"
            f"    # ---\n    third = other - {n} + 77\n"
            "    # return total * other\n    return total * other\n"
        )
    return made


@pytest.fixture(scope="module")
def data(folder, policy):
    made = CodeLines([str(folder)], validation_share=0.4, split_seed=1, max_prompt_tokens=120)
    made.connect(policy.tokenizer)
    return made


@pytest.fixture(scope="module")
def corpus(data):
    return lines.Corpus(data, NextLineLikelihood(), seed=0)


def naive(policy, before: str, line: str) -> float:
    """Return log p(line | before) per token, from the network's own logits in float64."""
    ids = policy.tokenizer(before + line, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        rows = policy.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first = len(before)  # a character is a token
    return sum(rows[i - 1, ids[i]].item() for i in range(first, len(ids))) / (len(ids) - first)


def test_gains_are_those_of_a_naive_loop(policy, data, corpus):
    row = next(row for row in corpus.rows(50) if row.has_comment)
    given = {
        "a": [corpus.thought(row.row, "# some words"), corpus.thought(row.row, "# x")],
        "b": row.comments["of the file"],
    }
    measured = thoughts.likelihoods(policy, data, row.row, given)
    indent, line = row.row.extra["indentation"], row.row.extra["line"]
    before = row.row.prompt.removesuffix(indent)
    assert before
    assert "count the names" not in before.splitlines()[-1]
    text = line.removeprefix(indent)  # the indentation is given
    act = naive(policy, before + indent, text)
    assert measured["likelihood"] == pytest.approx(act, abs=1e-4)
    assert measured["tokens"] == len(text)
    for source, group in given.items():
        for one, result in zip(group, measured["thoughts"][source], strict=True):
            behind = naive(policy, f"{before}{indent}{one['text']}\n{indent}", text)
            assert result["gain"] == pytest.approx(behind - act, abs=1e-4)
            assert abs(behind - act) > 1e-3, "the check compares something"


def test_lines_behind_one_comment_lose_it_and_comments_of_others_are_of_other_files(corpus, data):
    rows = corpus.rows(500)
    held_out = {file.name for file in corpus.held_out}
    assert 0 < len(held_out) < 24
    assert {row.row.extra["file"] for row in rows} == held_out
    behind = [row for row in rows if row.has_comment]
    texts = {row.row.extra["line"].split()[0] for row in behind}
    assert texts == {"total", "return"}, "one comment of words: no blocks, no rulers"
    for row in behind:
        name = row.row.extra["file"]
        own, other = row.comments["of the file"][0], row.comments["of another file"][0]
        number = name.removeprefix("file_").removesuffix(".py")
        assert other["text"] != f"# count the names {number}"
        assert own["text"].strip("# ") not in row.row.prompt
        is_copy = own["text"] == "# return total * other"
        assert own["usable"] is not is_copy
    assert corpus.rows(3) == [*rows[:3], *behind[:3]], "a part is the beginning of the whole"


def test_chances_to_think_are_the_softmax_of_two_tokens(policy, data):
    rows = list(data.splits.validation[:3])
    drawn, chances = thoughts.sampled_thoughts(
        policy, data, rows, NextLineLikelihood(), count=2, longest=9, seed=(0, 0)
    )
    act, think = policy.token_texts.index("\n"), policy.token_texts.index("#")
    for row, group, chance in zip(rows, drawn, chances, strict=True):
        ids = policy.tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = policy.network(torch.tensor([ids])).logits[0, -1].double()
        assert chance == pytest.approx(logits[[act, think]].softmax(0)[1].item(), abs=1e-5)
        assert len(group) == 2
        for one in group:
            assert one["text"].startswith("#")
            assert len(one["ids"]) <= 9
            ends = policy.token_texts[one["ids"][-1]] == "\n"
            assert not one["usable"] or ends, "a thought that does not end is not used"


def record(file, gains, usable, thinks=0.5, kind="any"):
    group = [
        {"text": "#", "usable": use, "gain": value}
        for use, value in zip(usable, gains, strict=True)
    ]
    given = {"of another file": [{"text": "#", "usable": True, "gain": 0.1}], "sampled": group}
    return {
        **{"file": file, "lines": kind, "likelihood": -2.0, "tokens": 5},
        **{"thoughts": given, "thinks": {"sampled": thinks}},
    }


def test_tables_by_hand():
    records = [
        record("a", [0.3, -0.5], [True, True]),
        record("a", [0.4, 9.0], [True, False], thinks=1.0),
        record("b", [0.02, 0.0], [True, True], thinks=0.0),
    ]
    _, row = tables.gains(records, [0.01, 0.35])
    # five thoughts are used; files: a has 0.3 - 0.5 + 0.4 over 3, b has 0.02 over 2
    mean = (0.2 + 0.02) / 5
    assert row["used"] == pytest.approx(5 / 6)
    assert row["gain"] == pytest.approx(mean)
    error = (2 * ((0.2 - 3 * mean) ** 2 + (0.02 - 2 * mean) ** 2)) ** 0.5 / 5
    assert row["gain low"] == pytest.approx(mean - 1.96 * error)
    assert [row["above 0.01"], row["above 0.35"]] == pytest.approx([3 / 6, 1 / 6])
    assert [row["best above 0.01"], row["best above 0.35"]] == pytest.approx([1, 1 / 3])
    # by line: 0.5 (-0.1 - c), 1 (0.2 - c), 0
    control, _ = tables.rewards(records, [0.05])
    assert control["thinks"] == 1  # a comment in front of every line
    assert control["reward"] == pytest.approx(0.1 - 0.05)
    _, first = tables.rewards(records, [0.1])
    assert first["reward"] == pytest.approx((0.5 * -0.2 + 0.1) / 3)
    assert first["r"] == pytest.approx(-2 + (0.5 * -0.2 + 0.1) / 3)
    assert first["thinks"] == pytest.approx(0.5)
    (pair,) = tables.differences(records)
    assert pair["thoughts"] == "sampled - of another file"
    assert pair["difference"] == pytest.approx((-0.1 + 0.2 + 0.01) / 3 - 0.1)
    assert tables.rises(records, [0.1]) == [], "there is no trained policy"


def test_the_rise_of_a_reward_by_hand():
    records = [
        record("a", [0.3, -0.5], [True, True]),
        record("b", [0.4, 9.0], [True, False], thinks=1.0),
    ]
    for one in records:
        one["thoughts"]["trained"] = [{"text": "#", "usable": True, "gain": 0.6}]
        one["thinks"]["trained"] = 0.25
    before, random = tables.rises(records, [0.1])
    # trained: 0.25 (0.6 - 0.1); sampled: 0.5 (-0.1 - 0.1) and 1 (0.2 - 0.1)
    assert before["reward"] == "trained - sampled"
    assert before["difference"] == pytest.approx(0.125 - (-0.1 + 0.1) / 2)
    assert random["reward"] == "trained - of another file"
    assert random["difference"] == pytest.approx(0.125 - (0.1 - 0.1))


def test_the_command_goes_on_and_prints_tables(policy, folder, tmp_path, capsys):
    policy.network.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--paths", str(folder), "--lines", "4"]
    words += ["--thoughts", "2", "--max-new-tokens", "6", "--max-prompt-tokens", "90"]
    words += ["--batch", "3"]
    gain.main([*words, "--out", str(tmp_path / "a")])
    printed = capsys.readouterr().out
    assert "| any | sampled | 4 | 8 |" in printed
    path = tmp_path / "a" / "lines.jsonl"
    whole = path.read_text()
    records = [json.loads(line) for line in whole.splitlines()[1:]]
    assert [row["lines"] for row in records[:4]] == ["any"] * 4
    # a kill within a batch, and within a line
    path.write_text(whole[: whole.index("\n", len(whole) // 2) + 9])
    gain.main([*words, "--out", str(tmp_path / "a")])
    assert path.read_text() == whole
    with (tmp_path / "a" / "gains.csv").open() as file:
        assert {row["lines"] for row in csv.DictReader(file)} == {"any", "with a comment"}
    with pytest.raises(UserError, match="has results of other options; give another --out"):
        gain.main([*words, "--seed", "1", "--out", str(tmp_path / "a")])


CONFIG = """
model:
  class_path: PolicyOptimization
  init_args:
    policy: {class_path: TinyPolicy, init_args: {characters: CHARACTERS, hidden_size: 16, layers: 1,
             heads: 2, max_length: 512}}
    objective: {advantage: GroupRelative}
data: {class_path: CodeLines, init_args: {paths: [FOLDER], validation_share: 0.4, split_seed: 1,
       max_prompt_tokens: 90}}
rollout: {rewards: [{class_path: NextLineLikelihood, init_args: {overlap: 1.0}}]}
"""


def test_a_trained_policy_is_measured_beside_its_base(folder, tmp_path, capsys):
    from tests.support.code_corpus import CHARACTERS

    text = CONFIG.replace("FOLDER", str(folder)).replace("CHARACTERS", json.dumps(CHARACTERS))
    (tmp_path / "run.yaml").write_text(text)
    trained = tiny()
    torch.manual_seed(5)
    trained.build(device=torch.device("cpu"), reference=False)
    state = {f"policy.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    words = ["-c", str(tmp_path / "run.yaml"), "--checkpoint", str(tmp_path / "last.ckpt")]
    words += ["--lines", "3", "--thoughts", "2", "--max-new-tokens", "5", "--out", str(tmp_path)]
    gain.main(words)
    printed = capsys.readouterr().out
    for name in ("any | trained", "any | trained - sampled", "any | trained - of another file"):
        assert f"| {name} |" in printed
    assert "| trained | 0.05 | 3 |" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --model SOURCE or -c CONFIG, one of them"),
        (["--model", "x", "-c", "y"], "give --model SOURCE or -c CONFIG, one of them"),
        (["--model", "x", "--oops", "1"], "there is no option '--oops'"),
        (["--model", "x", "--checkpoint", "y"], "`--checkpoint` needs -c"),
        (["-c", "quickstart"], "needs a `CausalPolicy` and the data `CodeLines`"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        gain.main([*words, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)
