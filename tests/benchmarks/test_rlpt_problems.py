"""The data sets of the coverage study of RLPT, and the judges of their completions."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.types import Finish, PromptRow
from tests.support.builders import make_rollout, right_padded
from tests.support.rlpt_problems import GSM8K, HUMANEVAL
from tests.support.rlpt_scripts import execute, problems


def test_references_of_each_data_set(problem_files):
    first = problems.read_gsm8k(problem_files / "gsm8k.jsonl")
    assert [row.target for row in first] == ["5", "3", "2,000"]
    assert first[0].solution == GSM8K[0]["answer"]
    assert (
        problems.read_gsm8k_plain(problem_files / "gsm8k.jsonl")[0].solution
        == "2+3 = 5 is all.\n#### 5"
    )
    assert [row.solution for row in problems.read_svamp(problem_files / "svamp.json")] == [
        "(7 - 5) * 1.5 = 3",
        "10 / 5 = 2",
    ]
    (row,) = problems.read_humaneval(problem_files / "humaneval.jsonl.gz")
    assert row.prompt + row.solution == HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"]
    assert row.solution.startswith("\n    return")


def test_problems_are_drawn_by_seed(problem_files):
    draws = {
        tuple(
            r.prompt for r in problems.load_problems(f"gsm8k={problem_files}/gsm8k.jsonl", 2, s)[1]
        )
        for s in range(9)
    }
    assert len(draws) > 2
    assert all(len(set(draw)) == 2 for draw in draws)


def responses(plain_policy, texts, row):
    """Return a rollout with given responses."""
    ids = [plain_policy.tokenizer(text)["input_ids"] for text in texts]
    rollout = make_rollout([2], [len(each) for each in ids])
    mask = right_padded([len(each) for each in ids])
    rollout.tokens_BL[:, rollout.prompt_length :][mask] = torch.tensor(
        [i for each in ids for i in each]
    )
    object.__setattr__(rollout, "texts", tuple(texts))
    object.__setattr__(rollout, "rows", (row,) * len(texts))
    return rollout


def test_word_problems_are_judged_by_their_answer(plain_policy):
    rollout = responses(
        plain_policy, ["It is 2,000.", "It is 1999.", "No idea"], PromptRow("?", "2,000")
    )
    rollout.finish_B.fill_(int(Finish.STOP))
    right, mask = problems.right_answers(rollout)
    assert right.tolist() == [True, False, False]
    assert torch.equal(mask, rollout.response_mask_BT)


def test_programs_are_judged_up_to_the_end_of_the_function(plain_policy, problem_files):
    (row,) = problems.read_humaneval(problem_files / "humaneval.jsonl.gz")
    texts = ["\n    return 1\n\nreturn this", "\n    return 1", "\n    return 2", "return 1", ""]
    rollout = responses(plain_policy, texts, row)
    right, mask = problems.right_programs(rollout, plain_policy.tokenizer)
    assert right.tolist() == [True, True, False, False, False]
    assert mask.sum(1).tolist()[:2] == [len("\n    return 1\n"), len("\n    return 1")]
    assert mask[0, : len("\n    return 1\n")].all()


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("x = bytearray(1 << 30)", False),
        ("open('large', 'wb').write(bytes(1 << 22))", False),
        ("import os; assert not os.environ.get('HOME')", True),
        ("def broken(:", False),
    ],
)
def test_a_program_passes_if_it_gets_to_its_end_within_limits(program, passed, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert execute.passes(program, seconds=1, megabytes=512) is passed
