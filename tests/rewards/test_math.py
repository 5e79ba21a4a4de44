"""`MathAnswer`: what equals what, and that no response can hang, crash or fill the trainer."""

from __future__ import annotations

import concurrent.futures
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


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, inside, most = math_rewards._exchange, [], []

    def watched(*args: Any) -> str:
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.005)
        try:
            return exchange(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(math_rewards, "_exchange", watched)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(MathAnswer().score, [completion(f"{i}.00", str(i))])
            for i in range(200, 240)
        ]
        assert all(job.result() == [1.0] for job in jobs)
    assert max(most) == 1


def test_a_response_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = math_rewards._helper.ask
    monkeypatch.setattr(math_rewards._helper, "ask", lambda *args: asked.append(args) or ask(*args))
    score_all([MathAnswer()], [completion("parsed once 51", "51")] * 4)
    assert len(asked) == 1


def _score_in_child(queue: multiprocessing.Queue) -> None:
    queue.put(
        (MathAnswer().score([completion("forked 7", "7")]), math_rewards._helper._process.pid)
    )


def test_a_forked_process_has_a_helper_of_its_own() -> None:
    MathAnswer().score([completion("before the fork", "1")])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_score_in_child, args=(queue,))
    child.start()
    score, helper = queue.get(timeout=60)
    child.join()
    assert score == [1.0]
    assert helper != math_rewards._helper._process.pid
    assert MathAnswer().score([completion("after the fork 1", "1")]) == [1.0]


def test_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(MathAnswer(seconds=2))).seconds == 2


def test_the_helper_ends_with_its_parent() -> None:
    code = (
        "from lightning_mpo.rewards import Completion, MathAnswer, math\n"
        "MathAnswer().score([Completion('p', '1', '1', 1, True, {})])\n"
        "print(math._helper._process.pid, flush=True)\n"
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
    monkeypatch.setattr(math_rewards, "_helper", math_rewards._Helper())
    with pytest.raises(
        RewardError, match=r"does not start \(exit status 3\); `.*worker.py` shows why"
    ):
        score_all([MathAnswer()], [completion("never asked before", "51")])


def test_seconds_must_be_positive() -> None:
    with pytest.raises(UserError, match="`MathAnswer.seconds` must be positive, got 0"):
        MathAnswer(seconds=0)
