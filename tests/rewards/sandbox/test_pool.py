"""Pools: results in order, one interpreter for each program, forks, and sandboxes that end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.sandbox import Job, Level, Pool, Result, container
from tests.support.sandboxes import GOOD, PATIENT, adding, isolating_level

SAME = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(isolating_level(), PATIENT, 2)
    yield pool
    pool.close()


def script(code: str, *cases: tuple[str, str], each: bool = False) -> Job:
    return Job((code,), cases, each=each)


def calls(code: str, *tests: str, each: bool = False) -> Job:
    return Job((code,), tests=tests, setup=("",), each=each)


def test_results_come_in_order(pool: Pool) -> None:
    bad = adding("def add(a, b):\n    return a - b")
    done = pool.run([GOOD, bad, GOOD, bad, bad, GOOD])
    assert [result.all_passed for result in done] == [True, False, True, False, False, True]


def test_programs_share_nothing(pool: Pool) -> None:
    write = script(
        "import builtins\nbuiltins.x = 1\nopen('/tmp/x', 'w').close()\nprint(1)", ("", "1")
    )
    read = script(
        "import os, builtins\nprint(os.listdir('/tmp'), hasattr(builtins, 'x'))", ("", "[] False")
    )
    assert [result.all_passed for result in pool.run([write, read] * 4)] == [True] * 8


def test_programs_have_an_environment_without_variables_of_the_run(pool: Pool, monkeypatch) -> None:
    names = "HOME LANG OMP_NUM_THREADS PATH PWD PYTHONHASHSEED"
    (result,) = pool.run([script("import os\nprint(*sorted(os.environ))", ("", names))])
    assert result.all_passed, result.output


def test_hashes_and_random_numbers_are_the_same_each_time(pool: Pool) -> None:
    code = "import random\nprint(hash('a'), random.random())"
    (first,) = pool.run([script(code, ("", "?"))])
    assert pool.run([script(code, ("", first.output.decode()))])[0].all_passed


def test_usual_programs_run(pool: Pool) -> None:
    """Threads, child processes, temporary files, recursion, data classes, C extensions, exit()."""
    codes = [
        "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()",
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout)",
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    print(f.write(b'1'))",
        "import sys\nsys.setrecursionlimit(5000)\nf = lambda n: n and f(n - 1)\nprint(f(4000) + 1)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nprint(A().x)",
        "import hashlib, sqlite3, decimal, asyncio\nprint(1)\nexit()",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print(1)\nasyncio.run(f())",
        "from multiprocessing import Manager\nwith Manager() as m:\n    print(m.list([1])[0])",
        "from multiprocessing import Pool\nwith Pool(2) as p:\n    print(p.map(abs, [-1])[0])",
        "from multiprocessing import Array\nprint(sum(Array('i', [1])))",
        "from multiprocessing import shared_memory as s\nprint(1)\ns.SharedMemory('a', True, 9).unlink()",
        "import os\nprint(1, file=open(os.devnull, 'w'))\nprint(1)",
        "import subprocess as s\nprint(1 + s.call('true', stdout=s.DEVNULL))",
    ]
    done = pool.run([script(code, ("1", "1")) for code in codes])
    assert [code for code, result in zip(codes, done, strict=True) if not result.all_passed] == []


def test_cases_count_one_by_one(pool: Pool) -> None:
    cases = [("1", "1"), ("2", "x"), ("3", "3")]
    each, first = pool.run([script("print(input())", *cases, each=each) for each in (True, False)])
    assert (each.passed, each.total) == (2, 3)
    assert (first.passed, first.total, first.all_passed) == (1, 2, False)


def test_assertions_count_one_by_one(pool: Pool) -> None:
    tests = (
        "assert True",
        "for i in range(4):\n    assert f(i) < 3",
        "f(7)",
        "1 / 0",
        "assert not f(0)",
    )
    (result,) = pool.run([calls("def f(x):\n    return x", *tests, each=True)])
    assert (result.passed, result.total) == (6, 8)  # `assert True` in a test of its own passes it


def test_assertions_behind_an_exception_have_failed(pool: Pool) -> None:
    test = "assert f(1) == 1\nx = f(2)\nassert x == 2\nassert f(3) == 3"
    code = "def f(x):\n    return [][x - 1:][0] if x > 1 else x"
    (result,) = pool.run([calls(code, test, each=True)])
    assert (result.passed, result.total) == (1, 3)


def test_a_program_that_dies_loses_what_it_had(pool: Pool) -> None:
    code = "import os\ndef f(x):\n    return x if x < 3 else os._exit(0)"
    (result,) = pool.run([calls(code, "for i in range(4):\n    assert f(i) == i", each=True)])
    assert (result.end, result.passed) == ("crash", 0)


def test_a_test_may_expect_an_exception_but_no_lost_program(pool: Pool) -> None:
    test = "try:\n    f(0)\nexcept {}:\n    pass\nelse:\n    assert False"
    raising = "class E(ValueError): pass\ndef f(x):\n    raise E('no')"
    ending = "import os\ndef f(x):\n    os._exit(0)"
    done = pool.run(
        [
            calls(raising, test.format("ValueError")),
            calls(raising, test.format("KeyError")),
            calls(ending, test.format("BaseException")),
        ]
    )
    assert [result.all_passed for result in done] == [True, False, False]


@pytest.mark.parametrize("each", [False, True])
def test_a_program_that_does_not_raise_fails_a_test_for_it(pool: Pool, each: bool) -> None:
    test = "try:\n    f(0)\n    assert False, 'no exception'\nexcept ValueError:\n    pass"
    codes = ("def f(x):\n    return 1", "def f(x):\n    raise ValueError")
    done = pool.run([calls(code, test, each=each) for code in codes])
    assert [(result.passed, result.total) for result in done] == [(0, 1), (1, 1)]


def test_a_built_in_function_is_no_function_of_the_program(pool: Pool) -> None:
    tests = ("assert max([1, 5]) == 5", "try:\n    max(1)\nexcept LookupError:\n    pass")
    done = pool.run([calls("x = 1", test) for test in tests])
    assert [result.passed for result in done] == [0, 0]


def test_objects_stay_with_the_program(pool: Pool) -> None:
    code = """
class Pair:
    def __init__(self, a): self.a = a
    def twice(self): return 2 * self.a

def total(pairs): return sum(pair.a for pair in pairs)
"""
    tests = (
        "assert total([Pair(1), Pair(2)]) == 3",
        "assert Pair(4).twice() == 8",
        "assert Pair(4).a == 4",
    )
    equal = ("assert Pair(4) == Pair(4)",)
    done = pool.run([calls(code, *tests), calls(code, *equal), calls(code, "assert Pair(1)")])
    assert [result.all_passed for result in done] == [True, False, False]


def test_broken_tests_are_no_fault_of_the_program(pool: Pool) -> None:
    missing = Job((SAME,), tests=("assert add(1, 1) == 2",), setup=("import no_such_module",))
    done = pool.run([missing, calls(SAME, "assert add(1, 1) =="), calls(SAME, "assert 1 == 1")])
    assert [bool(result.broken) for result in done] == [True, True, True]


def test_a_lost_sandbox_is_replaced(pool: Pool) -> None:
    assert pool.run([GOOD])[0].all_passed
    for sandbox in pool._open:
        assert sandbox._process is not None
        os.killpg(sandbox._process.pid, signal.SIGKILL)
    assert [result.all_passed for result in pool.run([GOOD] * 4)] == [True] * 4


def test_a_sandbox_that_lost_its_keeper_ends(pool: Pool, monkeypatch) -> None:
    assert pool.run([GOOD])[0].all_passed
    (sandbox,) = pool._open[:1]
    with monkeypatch.context() as patch:
        patch.setattr(container.Sandbox, "_exchange", lambda *a: Result("lost"))
        assert sandbox.run(GOOD).end == "lost"
    assert sandbox._process is None
    assert sandbox.run(GOOD).all_passed


def test_sandboxes_end_with_the_pool() -> None:
    pool = Pool(isolating_level(), PATIENT, 1)
    assert pool.run([GOOD])[0].all_passed
    process = psutil.Process(pool._open[0]._process.pid)
    inside = process.children(recursive=True)
    pool.close()
    psutil.wait_procs([process, *inside], timeout=60)
    assert not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in [process, *inside]
    )


def test_a_fork_has_sandboxes_of_its_own(pool: Pool) -> None:
    assert pool.run([GOOD])[0].all_passed
    pid = os.fork()
    if pid == 0:
        good = pool.run([GOOD])[0].all_passed
        pool.close()
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pool.run([GOOD])[0].all_passed


def test_a_sandbox_that_does_not_start_says_why(monkeypatch) -> None:
    monkeypatch.setattr(Level, "command", lambda *a: ["/bin/sh", "-c", "echo 'no walls' >&2"])
    with pytest.raises(UserError, match="the sandbox for programs does not start: no walls"):
        Pool(Level("test", isolated=True), PATIENT, 1).run([GOOD])


def test_a_pool_that_did_not_start_starts_later(monkeypatch) -> None:
    pool = Pool(isolating_level(), PATIENT, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Level, "command", lambda *a: ["/bin/false"])
        with pytest.raises(UserError, match="does not start: no message"):
            pool.run([GOOD])
    assert not pool._owner, "the next call would wait for a sandbox"
    try:
        assert pool.run([GOOD])[0].all_passed
    finally:
        pool.close()


def test_the_weak_level_runs_programs(monkeypatch) -> None:
    """As the present user, since another one may not be able to read the interpreter."""
    monkeypatch.setattr(container, "user_of_programs", lambda unique: None)
    pool = Pool(Level("limits", isolated=False), PATIENT, 1)
    codes = [SAME, "import os\nos._exit(0)", "import socket\nsocket.socket()\n" + SAME]
    orphan = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    try:
        done = pool.run([adding(code) for code in [*codes, orphan, SAME]])
    finally:
        pool.close()
    assert [result.all_passed for result in done] == [True, False, False, False, True]
