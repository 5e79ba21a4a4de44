"""Curricula: which rows are open when, and what a run has to offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mpo.data import PromptDataModule, Splits
from lightning_mpo.data.curriculum import Curriculum, EasyToHard, Stages, SuccessRate
from lightning_mpo.errors import UserError
from lightning_mpo.rewards import ExactAnswer, Finished
from lightning_mpo.types import PromptRow


class Levels(PromptDataModule):
    """Rows with a level each: 1, 2, 3, 1, 2, 3, ..."""

    def __init__(self, levels: tuple[Any, ...] = (1, 2, 3) * 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = levels

    def load(self) -> Splits:
        rows = [PromptRow(f"{i}", "1", extra={"level": x}) for i, x in enumerate(self.levels)]
        return Splits(rows, [PromptRow("held out", "1")])


def levels_of(data: Levels, counter: int, count: int = 6, round: int = 0) -> set[Any]:
    return {row.extra["level"] for row in data.training_rows(counter, count, round)}


CURRICULA: list[Curriculum] = [
    SuccessRate(),
    EasyToHard(rollouts=4),
    Stages({0: [1, 3], 5: [2]}),
]


@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("round", [0, 2])
def test_rows_are_a_function_of_seed_counter_round_and_state(curriculum, round):
    data, same = Levels(curriculum=curriculum), Levels(curriculum=curriculum)
    ahead = [data.training_rows(i, 3, round) for i in range(8)]
    torch.manual_seed(5)
    assert [same.training_rows(i, 3, round) for i in reversed(range(8))] == ahead[::-1]
    other = Levels(curriculum=curriculum, seed=1)
    assert [other.training_rows(i, 3, round) for i in range(8)] != ahead
    assert data.training_rows(3, 3, round + 1) != ahead[3]
    assert all(len({row.prompt for row in rows}) == 3 for rows in ahead)


def test_levels_open_one_after_the_other_and_stay_open():
    data = Levels(curriculum=EasyToHard(rollouts=10))
    seen = [levels_of(data, counter, 12) for counter in range(14)]
    assert seen == [{1}] * 5 + [{1, 2}] * 5 + [{1, 2, 3}] * 4
    assert levels_of(data, 4, 12, round=3) == {1}
    assert data.order_metrics(4)["rollout/open_rows"] == pytest.approx(1 / 3)
    assert data.order_metrics(10)["rollout/open_rows"] == 1


@pytest.mark.parametrize(
    ("levels", "opened"),
    [
        (("Level 2", "Level 10", "Level ?", "Level 1"), ["Level 1"]),
        ((2.5, 1e9, -1, 0), [-1]),
        ((7, 7, 7, 7), [7]),
    ],
)
def test_levels_are_numbers_or_texts_with_one(levels, opened):
    data = Levels(levels, curriculum=EasyToHard(rollouts=3))
    assert levels_of(data, 0, 4) == set(opened)
    assert levels_of(data, 3, 4) == set(levels)
    if "Level ?" in levels:
        assert levels_of(data, 2, 4) == {"Level 1", "Level 2"}, "without a number: the last level"


def test_stages_replace_each_other():
    data = Levels((1, 2, "x", 3.0), curriculum=Stages({7: ["x", 3], 0: [1, 2], 9: ["2"]}))
    seen = [levels_of(data, counter, 2) for counter in (0, 6, 7, 8, 9, 100)]
    assert seen == [{1, 2}] * 2 + [{"x", 3.0}] * 2 + [{2}] * 2


def test_rows_with_mixed_results_are_drawn_more_often():
    data = Levels(curriculum=SuccessRate(floor=0.05, memory=8))
    for counter in range(200):
        rows = data.training_rows(counter, 3)
        # level 1 is always right, level 2 half of the time, level 3 never
        right = [{1: 4.0, 2: 2.0, 3: 0.0}[row.extra["level"]] for row in rows]
        counts = torch.tensor([[value, 4.0] for value in right], dtype=torch.float64)
        data.learner(counter, counts[None])
    drawn = [row.extra["level"] for i in range(400) for row in data.training_rows(1000 + i, 3)]
    shares = [drawn.count(level) / len(drawn) for level in (1, 2, 3)]
    assert shares[1] > 0.5
    assert min(shares) > 0.05, "each row is tried again"
    assert data.order_metrics(0)["rollout/open_rows"] < 0.9


def test_results_belong_to_the_rows_that_were_drawn_in_each_round():
    data = Levels(curriculum=SuccessRate(memory=100))
    rows = [data.training_rows(5, 2, round) for round in (0, 1)]
    counts = torch.tensor([[[1, 4], [2, 4]], [[3, 4], [0, 0]]], dtype=torch.float64)
    data.learner(5, counts)
    expected: dict[str, torch.Tensor] = {}
    for row, count in zip([*rows[0], *rows[1]], counts.flatten(0, 1), strict=True):
        expected[row.prompt] = expected.get(row.prompt, torch.zeros(2)) + count
    stored = data.curriculum.state_dict()["counts"]
    for row, count in zip(data.splits.train, stored, strict=True):
        assert count.tolist() == expected.get(row.prompt, torch.zeros(2)).tolist()


def test_a_state_restores_the_draws():
    first, second = (Levels(curriculum=SuccessRate()) for _ in range(2))
    first.learner(0, torch.tensor([[[0, 40]] * 3], dtype=torch.float64))
    assert [first.training_rows(i, 3) for i in range(9)] != [
        second.training_rows(i, 3) for i in range(9)
    ]
    second.curriculum.load_state_dict(first.curriculum.state_dict())
    assert [first.training_rows(i, 3) for i in range(9)] == [
        second.training_rows(i, 3) for i in range(9)
    ]
    longer = Levels((1, 2), curriculum=second.curriculum)
    with pytest.raises(UserError, match="has counts of 12 rows, and there are 2"):
        longer.training_rows(0, 1)
    for wrong in ([], torch.zeros(3, 2), torch.zeros(3, 3, dtype=torch.float64)):
        with pytest.raises(TypeError, match="`counts` of the curriculum must be"):
            second.curriculum.load_state_dict({"counts": wrong})


def test_only_success_rates_learn():
    assert Levels().learner is None
    assert Levels(curriculum=EasyToHard(rollouts=4)).learner is None
    assert EasyToHard(rollouts=4).state_dict() == {}
    EasyToHard(rollouts=4).check([Finished()])
    SuccessRate().check([Finished(), ExactAnswer()])
    with pytest.raises(UserError, match=r"`data.curriculum: SuccessRate` needs a reward that says"):
        SuccessRate().check([Finished()])


def test_identities_tell_curricula_apart():
    curricula = (None, *CURRICULA, SuccessRate(floor=0.2), EasyToHard(rollouts=5))
    described = [Levels(curriculum=curriculum).identity()["curriculum"] for curriculum in curricula]
    assert len({str(text) for text in described}) == len(curricula)
    learned = Levels(curriculum=SuccessRate())
    learned.learner(0, torch.tensor([[[0, 40]] * 3], dtype=torch.float64))
    assert learned.identity()["curriculum"] == described[1], "a state is no option"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": EasyToHard(3), "order": "file"}, "`data.order: file` and"),
        (
            {"curriculum": EasyToHard(3, "type")},
            "levels from the column 'type', and the prompt '0'",
        ),
        ({"curriculum": EasyToHard(3), "levels": ("x", "y")}, "no level in 'level' has a number"),
        ({"curriculum": Stages({0: [1], 4: [5]})}, "no training row has 'level' = '5'; rows have"),
        ({"curriculum": Stages({0: [1]}), "levels": (1, None)}, "and the prompt '1' has none"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_training(options, message):
    with pytest.raises(UserError) as caught:
        Levels(**options).setup("fit")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stages({3: [1]}), "must have a stage that begins at rollout 0"),
        (lambda: Stages({}), "must have a stage that begins at rollout 0"),
        (lambda: Stages({0: []}), "stage 0 must list at least one level"),
        (lambda: Stages({0: [1], -1: [2]}), "`Stages.stages` must be at least 0"),
        (lambda: EasyToHard(0), "`EasyToHard.rollouts` must be at least 1"),
        (lambda: SuccessRate(floor=0), "`SuccessRate.floor` must be in (0, 1]"),
        (lambda: SuccessRate(memory=0), "`SuccessRate.memory` must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
