"""`MathAnswer`: what equals what, and that no response can hang, crash or fill the trainer."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, MathAnswer, RewardError, score_all
from lightning_mpo.rewards import math as math_rewards


def completion(text: str, target: str, finished: bool = True) -> Completion:
    return Completion("prompt", text, target, 3, finished, {})


RIGHT = [
    ("51", "51"),
    ("51.0", "51"),
    ("51", "51.0"),
    ("The answer is $51.", "51"),
    ("The answer is: 51 dollars", "51"),
    ("76 - 25 = 51, so you pay $51.00 for 1 pack... The answer is 51.", "51"),
    (r"So it is \boxed{51}. I checked 3 times.", "51"),
    (r"\boxed{7}. No, that counts the children twice. They are \boxed{51}", "51"),
    (r"\boxed{7} \boxed{51}", "51"),
    (r"It is $\boxed{51}$. Here {7} is a set.", "51"),
    (r"\boxed{1} and \boxed{2}", r"\{1, 2\}"),
    ("#### 51", "51"),
    ("He has 2 left.\n#### 51 apples", "51"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    ("1/2", "0.5"),
    ("0.5", r"\frac{1}{2}"),
    (r"$\frac{2}{4}$", r"\frac{1}{2}"),
    ("1,000", "1000"),
    ("It costs $1,250,000.", "1250000"),
    ("1000", "1,000"),
    ("-3", "-3"),
    ("The answer is \u22123.", "-3"),
    ("102/2", "51"),
    (r"x = \boxed{(x+1)^2}", "x^2+2x+1"),
    ("51", r"\boxed{51}"),
]
WRONG = [
    ("50", "51"),
    ("3", "-3"),
    ("-3", "3"),
    (r"\boxed{50}, although 51", "51"),
    ("51 or rather 52", "51"),
    (r"\boxed{51} or \boxed{52}", "51"),
    ("100", "1,000"),
    ("0.3", "1/3"),
    (r"\boxed{x+1}", "x+2"),
]
UNANSWERED = ["", "I do not know.", r"\boxed{", "{" * 3000, "(" * 3000 + ")" * 3000]
HOSTILE = [
    "9^9^9^9",
    "$10^{10^{10}}$",
    "$" + "{" * 2000 + "1" + "}" * 2000 + "$",
    r"\boxed{" * 3000,
    r"\frac{" * 500 + "1" + "}{2}" * 500,
    "1-" * 20000,
    "\x00\ud800" * 100,
]


@pytest.mark.parametrize(("text", "target"), RIGHT)
def test_right(text: str, target: str) -> None:
    assert MathAnswer().score([completion(text, target)]) == [1.0]


@pytest.mark.parametrize(("text", "target"), WRONG)
def test_wrong_but_answered(text: str, target: str) -> None:
    assert MathAnswer().score([completion(text, target)]) == [0.0]
    assert MathAnswer().answered([completion(text, target)]) == [True]


@pytest.mark.parametrize("text", UNANSWERED)
def test_no_answer_scores_zero_and_is_told_apart(text: str) -> None:
    scores = score_all([MathAnswer()], [completion(text, "51"), completion("51", "51")])
    assert scores.by_reward["math_answer"].tolist() == [0.0, 1.0]
    assert scores.answered_B.tolist() == [False, True]
    assert scores.valid_B.all()
    assert scores.correct_B.tolist() == [False, True]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_responses_take_bounded_time(text: str) -> None:
    start = time.process_time(), time.monotonic()
    assert MathAnswer(seconds=0.5).score([completion(text, "51"), completion("51", "51")]) == [
        0.0,
        1.0,
    ]
    assert time.process_time() - start[0] < 1  # the work is not done here
    assert time.monotonic() - start[1] < 30


def test_a_cut_off_response_gets_nothing_unless_allowed() -> None:
    cut = [completion("The answer is 51", "51", finished=False)]
    assert MathAnswer().score(cut) == [0.0]
    assert MathAnswer(require_finished=False).score(cut) == [1.0]
    assert MathAnswer().answered(cut) == [True]


def test_unreadable_target_is_not_judged_and_warned_of_once() -> None:
    math_rewards._warn_of_target.cache_clear()
    with pytest.warns(UserWarning, match="cannot read the target ''") as record:
        scores = score_all([MathAnswer()], [completion("51", ""), completion("52", "")])
    assert not scores.valid_B.any()
    assert len(record) == 1


def test_a_process_has_one_question_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, inside, together = math_rewards._exchange, [], []

    def watched(process: Any, line: str) -> str:
        assert process.pid not in inside
        inside.append(process.pid)
        together.append(len(inside))
        time.sleep(0.005)
        try:
            return exchange(process, line)
        finally:
            inside.remove(process.pid)

    monkeypatch.setattr(math_rewards, "_pool", math_rewards._Pool())
    monkeypatch.setattr(math_rewards, "_exchange", watched)
    batch = [completion(f"{i}.00", str(i)) for i in range(200, 240)]
    assert MathAnswer(workers=3).score(batch) == [1.0] * 40
    assert 1 < max(together) <= 3
    assert len(math_rewards._pool.idle) <= 3
    math_rewards._pool.close()


def test_a_response_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = math_rewards._pool.ask
    monkeypatch.setattr(math_rewards._pool, "ask", lambda *args: asked.append(args) or ask(*args))
    score_all([MathAnswer()], [completion("parsed once 51", "51")] * 4)
    assert len(asked) == 1


def _score_in_child(queue: multiprocessing.Queue) -> None:
    score = MathAnswer().score([completion("forked 7", "7")])
    queue.put((score, math_rewards._pool.idle[-1]._process.pid))


def test_a_forked_process_has_a_helper_of_its_own() -> None:
    MathAnswer().score([completion("before the fork", "1")])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_score_in_child, args=(queue,))
    child.start()
    score, helper = queue.get(timeout=60)
    child.join()
    assert score == [1.0]
    assert helper != math_rewards._pool.idle[-1]._process.pid
    assert MathAnswer().score([completion("after the fork 1", "1")]) == [1.0]


def test_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(MathAnswer(seconds=2))).seconds == 2


def test_the_helper_ends_with_its_parent() -> None:
    code = (
        "from lightning_mpo.rewards import Completion, MathAnswer, math\n"
        "MathAnswer().score([Completion('p', '1', '1', 1, True, {})])\n"
        "print(math._pool.idle[0]._process.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    pid = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=root
        ).stdout
    )
    for _ in range(100):
        try:
            alive = "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            alive = False
        if not alive:
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the helper process outlived its parent")


def test_a_helper_that_cannot_start_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)")
    monkeypatch.setattr(math_rewards, "_WORKER", worker)
    monkeypatch.setattr(math_rewards, "_pool", math_rewards._Pool())
    with pytest.raises(
        RewardError, match=r"does not start \(exit status 3\); `.*worker.py` shows why"
    ):
        score_all([MathAnswer()], [completion("never asked before", "51")])


EXTRACTS = {
    "boxed": (r"\boxed{7} #### 8 <answer>9</answer> 10", "7"),
    "tagged": (r"\boxed{7} #### 8 <answer>9</answer> 10", "9"),
    "hashes": (r"\boxed{7} <answer>9</answer> #### 8 apples", "8"),
    "number": (r"\boxed{7} #### 8 <answer>9</answer> so -1,010.5", "-1010.5"),
}


@pytest.mark.parametrize("extract", EXTRACTS)
def test_the_place_of_the_answer(extract: str) -> None:
    text, target = EXTRACTS[extract]
    reward = MathAnswer(extract=extract)
    others = sorted({"7", "8", "9", "10", "-1010.5"} - {target})
    rows = [completion(text, target), *(completion(text, other) for other in others)]
    assert reward.score(rows) == [1.0] + [0.0] * len(others)
    empty = [completion("nothing here", "7"), completion("", "7")]
    assert reward.answered(empty) == [False, False]
    assert reward.score(empty) == [0.0, 0.0]


def test_numbers_with_a_percent_sign_and_fractions() -> None:
    rows = [completion("It is 50 %.", "0.5"), completion("so 3/4", "0.75"), completion(".5", "1/2")]
    assert MathAnswer(extract="number").score(rows) == [1.0] * 3


def test_the_memory_of_each_process_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_rewards, "_pool", math_rewards._Pool())
    for gib in (2.0, 1.5):
        assert MathAnswer(memory=gib, workers=1).score([completion("6", "6")]) == [1.0]
        (helper,) = math_rewards._pool.idle
        limits = Path(f"/proc/{helper._process.pid}/limits").read_text()
        assert f"Max address space         {int(gib * 2**30)} " in limits
    math_rewards._pool.close()


def test_options_out_of_range() -> None:
    with pytest.raises(UserError, match=r"`MathAnswer.memory` must be in \[1, 1024\], got 0.5"):
        MathAnswer(memory=0.5)
    with pytest.raises(UserError, match="`MathAnswer.extract` must be"):
        MathAnswer(extract="last")


def test_seconds_must_be_positive() -> None:
    with pytest.raises(UserError, match="`MathAnswer.seconds` must be positive, got 0"):
        MathAnswer(seconds=0)
