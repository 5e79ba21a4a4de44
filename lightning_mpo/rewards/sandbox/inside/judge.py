"""The side of the tests: it runs the tests of the data set, which call the program as data.

Untrusted code never enters this process. A test holds `Remote` objects in place of the functions
and classes of the program. A call of one sends the arguments to the program's process, and returns
a value that was built here from the reply.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import random
import socket
from typing import Any

from lightning_mpo.rewards.sandbox.inside import frames
from lightning_mpo.rewards.sandbox.inside.values import decode, encode

LARGEST = 1 << 30
ENDS = ("StopIteration", "StopAsyncIteration", "GeneratorExit")
"""Exceptions that end a loop of a test, so that the rest of it would not be tested."""


class LostError(BaseException):
    """The program's process has ended, or it sent nonsense. No test can pass from here on."""


class Link:
    """The socket to the program."""

    def __init__(self, socket: socket.socket, most: int) -> None:
        self.socket, self.most, self.lost = socket, most, False

    def ask(self, question: dict[str, Any]) -> Any:
        """Send a question; return the value of the answer, or raise its exception."""
        try:
            if self.lost:
                raise LostError
            frames.send(self.socket, question)
            reply = frames.receive(self.socket, self.most)
            if "value" in reply:
                return decode(reply["value"], lambda number: Remote(self, int(number)))
            names, text = list(map(str, reply["error"])), str(reply.get("text"))
        except BaseException:
            self.lost = True
            raise LostError from None
        raise _exception(names, text)


def _exception(names: list[str], text: str) -> Exception:
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and name not in ENDS:
            with contextlib.suppress(TypeError):
                return kind(text)
    return RuntimeError(text)


class Remote:
    """A function, class or object of the program. It can be called, and has attributes.

    It is equal to nothing, and it is neither true nor false.
    """

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int | str) -> None:
        self._link, self._number = link, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        question = {"object": self._number, "arguments": encode(arguments, _number_of)}
        return self._link.ask(question | {"keywords": encode(keywords, _number_of)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask({"object": self._number, "attribute": name})

    def _refuse(self, *others: Any) -> bool:
        raise TypeError("the program returned an object that is no plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse


def _number_of(value: Any) -> Any:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"tests can send plain data only, not {type(value).__name__}")


def expected_names(tests: list[str], known: dict[str, Any]) -> set[str]:
    """Return the names that tests expect of the program.

    They are all names that nothing defines; else the one built-in function that tests call.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    free = {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound - known.keys()
    unknown = {name for name in free if not hasattr(builtins, name)}
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return unknown or (called & free if len(called & free) == 1 else set())


class CountAsserts(ast.NodeTransformer):
    """Lets each assertion of a test count for itself; the test goes on after one that fails.

    `assert True` counts for nothing.
    """

    def __init__(self) -> None:
        self.seen = 0
        """Assertions in the text."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        if isinstance(node.test, ast.Constant) and node.test.value:
            return ast.copy_location(ast.Pass(), node)
        self.seen += 1
        frame = ast.parse("try: pass\nexcept Exception: count__(False)\nelse: count__(True)")
        attempt = frame.body[0]
        assert isinstance(attempt, ast.Try)
        attempt.body = [node]
        return ast.copy_location(attempt, node)


def judge(spec: dict[str, Any], link: Link) -> dict[str, Any]:
    """Run the tests; return the counts.

    Args:
        spec: `setup`, code that runs first, in several alternatives; `tests`; `entry`, the name of
            the tested function or None; `each`: assertions count one by one.
        link: to the program.

    Returns:
        `broken`: why the tests cannot run; else `passed` and `total`.
    """
    counts: list[bool] = []
    space: dict[str, Any] = {"__name__": "tests", "count__": counts.append}
    # code of the data set before the tests
    for source in spec["setup"]:
        fresh = dict(space)
        try:
            exec(compile(source, "<setup>", "exec"), fresh)
        except SyntaxError:
            continue
        except Exception as error:
            return {"broken": f"their setup raised {type(error).__name__}: {error}"[:200]}
        space = fresh
        break
    # compile the tests
    try:
        names = {spec["entry"]} if spec["entry"] else expected_names(spec["tests"], space)
        codes = [_compile(test, spec["each"]) for test in spec["tests"]]
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"broken": f"they are no Python: {error}"[:200]}
    if not names or not codes:
        return {"broken": "they call no function of the program"}
    space |= {name: Remote(link, name) for name in names}
    # run them
    for code, assertions in codes:
        before = len(counts)
        good = _passes(code, dict(space))
        if link.lost:
            return {"passed": 0, "total": 1, "lost": True}
        if not good:  # the assertions behind the end of the test have failed as well
            counts += [False] * max(1, assertions - (len(counts) - before))
        elif len(counts) == before:
            counts.append(True)
        if not spec["each"] and not good:
            break
    return {"passed": sum(counts), "total": len(counts)}


def _compile(test: str, each: bool) -> tuple[Any, int]:
    """Return the code of a test, and the assertions that count one by one."""
    tree, count = ast.parse(test), CountAsserts()
    if each:
        tree = ast.fix_missing_locations(count.visit(tree))
    return compile(tree, "<tests>", "exec"), count.seen


def _passes(code: Any, space: dict[str, Any]) -> bool:
    try:
        exec(code, space)
    except BaseException:
        return False
    return True


def main(output: int) -> None:
    """Read the tests from descriptor 3, judge the program behind descriptor 4, answer, and end."""
    try:
        boss, link = socket.socket(fileno=3), Link(socket.socket(fileno=4), output)
        spec = frames.receive(boss, LARGEST)
        random.seed(0)
        verdict: dict[str, Any] = {"passed": 0, "total": 1}
        try:
            # the first message comes before untrusted code runs
            compiled = bool(frames.receive(link.socket, output)["compiled"])
            frames.send(boss, {"compiled": compiled})
            if compiled and "loaded" in frames.receive(link.socket, output):
                verdict = judge(spec, link)
        except (frames.BrokenLinkError, TypeError, KeyError):
            verdict["lost"] = True
        frames.send(boss, verdict)
    finally:
        os._exit(0)
