"""Four grades: every pair of right and form, uncertainty before both, and pass@1 that means right."""

from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, GradedAnswer, score_all
from lightning_mpo.rewards.graded import well_formed

FORM = "<think>so</think>\n<answer>{}</answer>"
TABLE = [
    # (target, text, the prompt opened thoughts, grade)
    ("51", FORM.format("51"), False, 2),
    ("51", FORM.format(r"\boxed{51.0}"), False, 2),
    ("51", "<answer>51</answer>", False, 1),
    ("51", "51", False, 1),
    ("51", "<answer>51</answer><think>so</think>51", False, 1),
    ("51", FORM.format("51") + FORM.format("51"), False, 1),
    ("51", FORM.format("50"), False, -1),
    ("51", "50", False, -1),
    ("51", "", False, -1),
    ("51", "<think>so", False, -1),
    ("51", "so</think><answer>51</answer>", True, 2),
    ("51", FORM.format("51"), True, 2),
    ("51", "so</think>51", True, 1),
    ("51", "so <answer>51</answer>", True, -1),
    ("51", "so</think><answer>51</answer>", False, 1),
    # uncertainty, whatever the answer and the form are
    ("51", FORM.format("It cannot be determined."), False, 0),
    ("51", "I don\u2019t know, but \\boxed{51}", False, 0),
    ("51", "Not enough\n  information: 50", False, 0),
    ("51", "<think>I do not know yet</think><answer>51</answer>", False, 2),
    ("51", "I do not know</think><answer>50</answer>", True, -1),
    # a target that cannot be read
    ("", "51", False, None),
    ("", "I do not know", False, None),
]


def done(target: str, text: str, thinking: bool = False, finished: bool = True) -> Completion:
    return Completion("prompt", text, target, 9, finished, {}, thinking)


def test_grades():
    rows = [done(target, text, thinking) for target, text, thinking, _ in TABLE]
    assert GradedAnswer().score(rows) == [grade for *_, grade in TABLE]


def test_right_means_right():
    rows = [done(target, text, thinking) for target, text, thinking, _ in TABLE]
    scores = score_all([GradedAnswer(weight=0.1)], rows)
    assert scores.correct_B.tolist() == [grade in (1, 2) for *_, grade in TABLE]
    assert scores.decided_B.tolist() == [grade is not None for *_, grade in TABLE]


def test_an_uncertain_response_has_no_answer():
    rows = [done("51", "I do not know. 51"), done("51", "50"), done("51", "")]
    assert GradedAnswer().answered(rows) == [False, True, False]
    assert GradedAnswer().answers(rows) == [None, "50", None]


def test_a_response_that_was_cut_off_is_wrong():
    rows = [done("51", "51", finished=False)]
    assert GradedAnswer().score(rows) == [-1]
    assert GradedAnswer(require_finished=False).score(rows) == [1]


def test_phrases_of_the_user_take_the_place_of_ours():
    rows = [done("51", "Who can tell? 51"), done("51", "I do not know. 51")]
    assert GradedAnswer(phrases=["WHO can tell"]).score(rows) == [0, 1]
    for phrases in ([], [" "]):
        with pytest.raises(UserError, match="`GradedAnswer.phrases` must hold texts"):
            GradedAnswer(phrases=phrases)


@pytest.mark.parametrize("missing", range(4))
def test_each_tag_is_needed_once(missing):
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    assert well_formed("".join(tags), thinking=False)
    without = "".join(tags[:missing] + tags[missing + 1 :])
    assert not well_formed(without, thinking=False)
    assert well_formed(without, thinking=True) == (missing == 0)
    assert not well_formed("".join(tags) + tags[missing], thinking=False)
    assert not well_formed("".join(tags[::-1]), thinking=False)
