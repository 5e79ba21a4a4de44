"""The coverage study of RLPT: its shares against a naive loop, and the command end to end."""

from __future__ import annotations

import argparse
import csv
import math

import pytest
import torch

from lightning_mpo.errors import UserError
from tests.support.rlpt_problems import CHARACTERS
from tests.support.rlpt_scripts import coverage, coverage_picture, problems

V = len(CHARACTERS) + 2
PNG = b"\x89PNG\r\n\x1a\n"
ABOUT = {"model": "tiny", "domain": "here", "source": "reference"}


@pytest.fixture(scope="module")
def plain_folder(plain_policy, tmp_path_factory):
    plain_folder = tmp_path_factory.mktemp("model")
    plain_policy.network.save_pretrained(plain_folder)
    plain_policy.tokenizer.save_pretrained(plain_folder)
    return str(plain_folder)


def data_of(plain_policy, path, name="gsm8k"):
    return problems.serve(name, problems.DOMAINS[name].read(path), plain_policy.tokenizer, "Say: ")


def naive_ranks(plain_policy, prompt, response):
    """Rank each token of a response by sorting the whole vocabulary."""
    logits = plain_policy.network(input_ids=torch.tensor([prompt + response])).logits[0]
    order = logits.argsort(-1, descending=True)
    return [order[len(prompt) - 1 + t].tolist().index(token) for t, token in enumerate(response)]


def table(tokens, tops):
    return {(row["position"], row["K"]): row for row in coverage.measure(tokens, tops, ABOUT)}


# --- shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_coverage_of_references_is_that_of_a_naive_loop(plain_policy, problem_files, batch):
    data = data_of(plain_policy, problem_files / "gsm8k.jsonl")
    tokens = coverage.reference_tokens(plain_policy, data, batch)
    ranks = []
    for row in data.rows:
        prompt, response = (
            plain_policy.tokenizer(text)["input_ids"]
            for text in (f"Say: {row.prompt}", row.solution)
        )
        assert row.prompt.endswith("?\n"), "without a chat template a line break ends the prompt"
        ranks.append(naive_ranks(plain_policy, prompt, response))
    rows = table(tokens, [1, 4, 30])
    bounds = {"all": (0, 999), "1": (0, 1), "2-8": (1, 8), "9-32": (8, 32), "33+": (32, 999)}
    for position, (start, stop) in bounds.items():
        inside = [part for part in (each[start:stop] for each in ranks) if part]
        for K in (1, 4, 30):
            row, hits = rows[position, K], [sum(rank < K for rank in part) for part in inside]
            n = [len(part) for part in inside]
            mean = sum(hits) / sum(n)
            assert row["coverage"] == pytest.approx(mean)
            assert (row["tokens"], row["problems"]) == (sum(n), len(n))
            if len(n) > 1 and row["low"] > 0:
                squares = sum((x - mean * y) ** 2 for x, y in zip(hits, n, strict=True))
                error = math.sqrt(len(n) / (len(n) - 1) * squares) / sum(n)
                assert row["low"] == pytest.approx(max(mean - 1.96 * error, 0))


def test_coverage_grows_with_k_up_to_one_and_positions_part_the_tokens(plain_policy, problem_files):
    tokens = coverage.reference_tokens(
        plain_policy, data_of(plain_policy, problem_files / "gsm8k.jsonl"), 64
    )
    tops = [1, 2, 8, 40, V]
    rows = table(tokens, tops)
    for position in coverage_picture.POSITIONS:
        shares = [rows[position, K]["coverage"] for K in tops]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert math.isnan(rows[position, V]["low"]), "tokens that are all covered have no spread"
    assert rows["all", 1]["coverage"] < rows["all", 8]["coverage"] < 1
    parts = [rows[position, 8] for position in ("1", "2-8", "9-32", "33+")]
    assert sum(row["tokens"] for row in parts) == rows["all", 8]["tokens"] == len(tokens.ranks_n)
    covered = sum(row["tokens"] * row["coverage"] for row in parts)
    assert covered == pytest.approx(rows["all", 8]["tokens"] * rows["all", 8]["coverage"])


def test_own_tokens_are_those_of_right_completions_only(
    plain_policy, problem_files, monkeypatch, capsys
):
    seen, data = [], data_of(plain_policy, problem_files / "gsm8k.jsonl")

    def judge(rollout):
        right = torch.tensor(
            [bool(rollout.responses_BT[b, 0] % 2) for b in range(len(rollout.rows))]
        )
        seen.append((rollout, right))
        return right, rollout.response_mask_BT

    monkeypatch.setattr(coverage, "right_answers", judge)
    options = argparse.Namespace(
        completions=4, batch=8, execute=False, seed=0, temperature=1.0, max_new_tokens=9
    )
    tokens = coverage.own_tokens(plain_policy, data, "gsm8k", options)
    ranks, owners = [], []
    for rollout, right in seen:
        for b in right.nonzero()[:, 0].tolist():
            S = rollout.prompt_length
            prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]].tolist()
            response = rollout.responses_BT[b][rollout.response_mask_BT[b]].tolist()
            ranks += naive_ranks(plain_policy, prompt, response)
            owners += [rollout.rows[b].prompt] * len(response)
    assert 0 < sum(int(right.sum()) for _, right in seen) < 12
    assert len(seen) == 2, "two problems with four completions each make a batch of eight"
    assert tokens.ranks_n.tolist() == ranks
    ordered = sorted(data.rows, key=lambda row: len(row.prompt) + len(row.solution))
    assert [ordered[i].prompt for i in tokens.problems_n.tolist()] == owners
    assert (
        f"{sum(int(right.sum()) for _, right in seen)} of 12 own completions are correct"
        in capsys.readouterr().out
    )


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_table_and_picture(
    plain_folder, problem_files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        coverage, "right_programs", lambda *_: pytest.fail("ran a program without --execute")
    )
    options = [
        "--completions",
        "2",
        "--max-new-tokens",
        "5",
        "--problems",
        "2",
        "--top",
        "1",
        "8",
        str(V),
    ]
    for names, out in (
        (("gsm8k=gsm8k.jsonl", "svamp=svamp.json"), "a"),
        (("humaneval=humaneval.jsonl.gz",), "b"),
    ):
        data = [
            f"{name}={problem_files / file}" for name, file in (text.split("=") for text in names)
        ]
        coverage.main(
            ["--model", plain_folder, "--data", *data, *options, "--out", str(tmp_path / out)]
        )
        assert (tmp_path / out / "coverage.png").read_bytes().startswith(PNG)
    said = capsys.readouterr().out
    assert "gsm8k: 0 of 4 own completions are correct, of 0 of 2 problems" in said
    assert "humaneval: no own completions, as judging them needs --execute" in said
    assert "| svamp | reference | all | 2 |" in said
    with (tmp_path / "a" / "coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["domain"], row["source"]) for row in rows} == {
        ("gsm8k", "reference"),
        ("svamp", "reference"),
    }
    assert {row["coverage"] for row in rows if row["K"] == str(V)} == {"1.0"}
    both = [str(tmp_path / out / "coverage.csv") for out in "ab"]
    coverage_picture.main([*both, "--out", str(tmp_path)])
    assert (tmp_path / "coverage.png").read_bytes().startswith(PNG)
    assert "| humaneval | reference | all | 1 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="two of the tables hold the same data set"):
        coverage_picture.main([both[0], both[0], "--out", str(tmp_path)])


def test_programs_run_with_execute_only(plain_folder, problem_files, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(problems, "passes", lambda program: ran.append(program) or True)
    options = [
        "--completions",
        "3",
        "--max-new-tokens",
        "4",
        "--batch",
        "2",
        "--out",
        str(tmp_path),
        "--execute",
    ]
    monkeypatch.setattr(problems, "function_body", lambda text: text or " ")
    coverage.main(
        [
            "--model",
            plain_folder,
            "--data",
            f"humaneval={problem_files}/humaneval.jsonl.gz",
            *options,
        ]
    )
    assert len(ran) == 3
    with (tmp_path / "coverage.csv").open() as file:
        own = [
            row
            for row in csv.DictReader(file)
            if row["source"] == "own correct" and row["position"] == "1"
        ]
    assert {row["tokens"] for row in own} == {"3"}


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("gsm8k={}/gsm8k.jsonl", ["--top", "0"], "must be between 1 and the model's 98 ids, got 0"),
        (
            "gsm8k={}/gsm8k.jsonl",
            ["--top", "4", "99"],
            "must be between 1 and the model's 98 ids, got 99",
        ),
        ("gsm9k={}/gsm8k.jsonl", [], "NAME is one of gsm8k, gsm8k_plain, svamp, humaneval"),
        ("{}/gsm8k.jsonl", [], "write NAME=PATH"),
        ("gsm8k={}/nothing.jsonl", [], "there is no file"),
        ("gsm8k={}/svamp.json", [], "line 1 of .* must be an object with columns|is not JSON"),
        ("svamp={}/gsm8k.jsonl", [], "line 1 of .* has no 'Body'"),
        ("humaneval={}/gsm8k.jsonl", [], "line 1 of .* has no 'prompt'"),
        ("gsm8k={}", [], "cannot read"),
        ("gsm8k={}/gsm8k.jsonl gsm8k={}/gsm8k.jsonl", [], "names a data set twice"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    plain_folder, problem_files, tmp_path, data, more, message
):
    texts = data.replace("{}", str(problem_files)).split()
    with pytest.raises(UserError, match=message) as caught:
        coverage.main(["--model", plain_folder, "--data", *texts, *more, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)
