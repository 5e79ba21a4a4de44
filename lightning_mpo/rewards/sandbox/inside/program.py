"""The side of the program: runs untrusted code. Nothing that it reports is taken on trust."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import socket
import sys
import threading
import types
from typing import Any

from lightning_mpo.rewards.sandbox.inside import frames
from lightning_mpo.rewards.sandbox.inside.values import decode, encode

LARGEST = 1 << 30


def compile_first(sources: list[str]) -> types.CodeType | None:
    """Return the code of the first text that is a program; None: no text is."""
    for source in sources:
        try:
            return compile(source, "<program>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            continue
    return None


def module_named(name: str) -> dict[str, Any]:
    """Return the namespace of a new module, which `sys.modules` has as well."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def run_script(code: types.CodeType) -> int:
    """Run a program as the main module; return its exit code."""
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    status = 1
    try:
        exec(code, module_named("__main__"))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        pass
    # what the interpreter does at its end
    vars(threading)["_shutdown"]()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BaseException:
        return 1
    return status & 255


def serve(code: types.CodeType, link: socket.socket) -> None:
    """Run a program that defines functions, then call them until the tests end."""
    space = module_named("program")
    try:
        exec(code, space)
    except BaseException as error:
        frames.send(link, {"error": _names(error)})
        return
    frames.send(link, {"loaded": True})
    objects: list[Any] = []

    def number_of(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def object_of(number: Any) -> Any:
        if isinstance(number, int):
            return objects[number]
        if number not in space:
            raise NameError(number)
        return space[number]

    while True:
        question = frames.receive(link, LARGEST)
        try:
            value = _answer(question, object_of)
            reply = {"value": encode(value, number_of)}
        except BaseException as error:
            reply = {"error": _names(error), "text": _text(error)}
        frames.send(link, reply)


def _answer(question: dict[str, Any], object_of: Any) -> Any:
    target = object_of(question["object"])
    if "attribute" in question:
        return getattr(target, question["attribute"])
    arguments = decode(question["arguments"], object_of)
    return target(*arguments, **decode(question["keywords"], object_of))


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _text(error: BaseException) -> str:
    with contextlib.suppress(BaseException):
        return str(error)[:1000]
    return ""


def main(stdin: bool, output: int) -> None:
    """Read the program from descriptor 3, run it, and end the process.

    Args:
        stdin: it reads standard input and writes to standard output; else it defines functions.
        output: largest message in bytes.
    """
    status = 1
    try:
        source = socket.socket(fileno=3)
        request = frames.receive(source, LARGEST)
        code = compile_first(request["sources"])
        random.seed(0)
        if not stdin:
            source.close()
            link = socket.socket(fileno=4)
            frames.send(link, {"compiled": code is not None})
            if code is not None:
                serve(code, link)
        else:
            frames.send(source, {"compiled": code is not None})
            with open(os.open(".", os.O_TMPFILE | os.O_RDWR), "w+b") as file:
                file.write(request["stdin"].encode("utf-8", "surrogateescape"))
                file.seek(0)
                os.dup2(file.fileno(), 0)
            os.dup2(3, 1)
            source.close()
            if code is not None:
                status = run_script(code)
    except BaseException:
        pass
    finally:
        os._exit(status)
