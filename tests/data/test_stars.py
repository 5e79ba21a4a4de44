"""`StarGraphs`: a naive search through the edges finds each target, and demonstrations follow arms."""

from __future__ import annotations

import pytest

from lightning_mpo.data.stars import StarGraphs
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards.base import Completion
from lightning_mpo.rewards.text import ExactAnswer


def rows(**options):
    return StarGraphs(**({"train_problems": 300, "held_out_problems": 30} | options)).splits.train


def read(prompt: str) -> tuple[list[str], str, str]:
    """Return edges, start and goal as the prompt lists them."""
    edges, question = prompt.split(";")
    ends, first = question.split("=")
    assert first == ends[0]
    return edges.split(","), ends[0], ends[1]


def walk(edges: list[str], node: str, goal: str) -> list[str]:
    """Search all paths from a node to the goal."""
    if node == goal:
        return [""]
    nexts = [edge[1] for edge in edges if edge[0] == node]
    return [after + rest for after in nexts for rest in walk(edges, after, goal)]


@pytest.mark.parametrize(("degree", "length", "alphabet"), [(2, 3, 26), (4, 2, 9), (3, 5, 52)])
def test_the_target_is_the_one_path_to_the_goal(degree, length, alphabet):
    goals = set()
    for row in rows(degree=degree, length=length, alphabet=alphabet):
        edges, start, goal = read(row.prompt)
        assert walk(edges, start, goal) == [row.target]
        assert len(row.target) == length
        assert len(edges) == degree * length == len(set(edges))
        assert sum(edge[0] == start for edge in edges) == degree
        assert len({node for edge in edges for node in edge}) == degree * length + 1
        goals.add([edge for edge in edges if edge[0] == start].index(start + row.target[0]))
    assert goals == set(range(degree)), "the place of an edge tells nothing"


@pytest.mark.parametrize("careless_share", [0.0, 0.4, 1.0])
def test_demonstrations_follow_an_arm_and_careless_ones_any(careless_share):
    found, right = rows(degree=4, careless_share=careless_share, train_problems=2000), 0
    for row in found:
        edges, start, _ = read(row.prompt)
        assert start + row.solution[0] in edges
        assert all(a + b in edges for a, b in zip(row.solution, row.solution[1:], strict=False))
        assert len(row.solution) == 3
        right += row.solution == row.target
    share = 1 - careless_share * 3 / 4
    # five standard errors
    assert right / 2000 == pytest.approx(share, abs=5 * (share * (1 - share) / 2000) ** 0.5)


def test_the_reward_compares_the_whole_response():
    reward, row = ExactAnswer(separator=None), rows()[0]
    texts = [row.target, row.target[:-1], f"{row.target}a", f";{row.target}", ""]
    done = [Completion(row.prompt, text, row.target, 4, True, {}) for text in texts]
    assert reward.score(done) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert reward.answered(done) == [True] * 4 + [False]


def test_the_policy_of_the_recipe_writes_it():
    policy = TinyPolicy(characters="abcdefghijklmnopqrstuvwxyz,;=")
    for row in rows()[:30]:
        ids = policy.tokenizer(row.prompt + row.solution)["input_ids"]
        assert policy.tokenizer.pad_token_id not in ids
        assert policy.tokenizer.decode(ids) == row.prompt + row.solution


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 1}, "`StarGraphs.degree` must be at least 2, got 1"),
        ({"length": 0}, "`StarGraphs.length` must be at least 1, got 0"),
        ({"alphabet": 6}, "`StarGraphs.alphabet` = 6 has too few letters for the 7 nodes"),
        ({"alphabet": 53}, "`StarGraphs.alphabet` must be at most 52"),
        ({"careless_share": 1.5}, "careless_share"),
        (
            {"length": 1, "alphabet": 3},
            "`StarGraphs.alphabet` = 3 gives 12 problems, and `held_out_share` = 0.1 leaves 11",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        StarGraphs(**options)
