"""The process that waits in a sandbox. It forks processes for each program and watches them.

For each program it forks a keeper. The keeper forks the judge, which runs the tests, and then the
program as the first process of a namespace of its own. When the first process of a namespace ends,
the kernel ends all others. The keeper watches time and memory, ends both, and reports.

Neither this process nor the keeper reads a program or a test: they are sent through sockets that
only the program and only the judge hold.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import site
import socket
import sys
import time
from typing import Any

from lightning_mpo.rewards.sandbox.inside import confine, judge, program

COMMON = (
    "abc array bisect builtins cmath collections contextlib copy dataclasses datetime decimal enum "
    "fractions functools heapq io itertools json math operator random re statistics string "
    "textwrap threading time traceback types typing"
)
"""Modules that are ready before a program imports them."""
TURN = 0.02
"""Seconds between two looks at the memory."""


def main(control: int, isolated: bool, user: int | None) -> None:
    """Answer requests until the other side closes the socket.

    Args:
        control: descriptor of the socket.
        isolated: namespaces are at hand.
        user: identity of programs, that of judges is one higher; None: the present one.
    """
    # be ready
    for name in COMMON.split():
        __import__(name)
    site.setquit()
    confine.end_first()
    confine.hide_memory()
    if isolated:
        confine.protect_devices()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    boss = socket.socket(fileno=control)
    boss.send(json.dumps({"ready": True, "python": sys.version.split()[0]}).encode())
    # one keeper for each request
    while True:
        text, fds, _, _ = socket.recv_fds(boss, 1 << 16, 2)
        if not text:
            return
        if not fds:  # a request to stop a program that had just ended
            continue
        pid = os.fork()
        if pid == 0:
            try:
                _keep(boss, json.loads(text), fds, isolated, user)
                os._exit(0)
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)
        _, status = os.waitpid(pid, 0)
        if status:
            boss.send(json.dumps({"end": "lost"}).encode())


def _keep(
    boss: socket.socket, request: dict[str, Any], fds: list[int], isolated: bool, user: int | None
) -> None:
    """Run one program, with its tests if it has any, and report its end."""
    start = time.monotonic()
    confine.adopt_orphans()
    limits = confine.Confinement(
        request["seconds"],
        request["memory"],
        request["processes"],
        request["disk"],
        isolated,
        user,
    )
    folder, calls = request["folder"], len(fds) == 2
    ours, theirs = socket.socketpair() if calls else (None, None)
    children: dict[str, int] = {}
    # the judge starts no process
    if ours is not None:
        of_judge = limits._replace(processes=0, user=None if user is None else user + 1)
        children["judge"] = pid = os.fork()
        if pid == 0:
            _enter(of_judge, [fds[1], ours.fileno()], folder)
            judge.main(request["output"])
    # the program
    if isolated:
        confine.call("unshare", confine.NEW_PIDS)
    children["program"] = pid = os.fork()
    if pid == 0:
        _enter(limits, [fds[0], *([] if theirs is None else [theirs.fileno()])], folder)
        program.main(not calls, request["output"])
    for fd in [*fds, *(side.fileno() for side in (ours, theirs) if side is not None)]:
        os.close(fd)
    # their end
    reason = _watch(boss, children, start + request["wall"], request["memory"], isolated)
    boss.send(json.dumps(reason | {"wall": time.monotonic() - start}).encode())


def _enter(to: confine.Confinement, fds: list[int], folder: str) -> None:
    """Confine a new process; end it if that fails."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        confine.confine(to, fds, folder)
    except BaseException as error:
        print(f"a program cannot be confined: {error!r}", file=sys.stderr, flush=True)
        os._exit(99)


def _watch(
    boss: socket.socket, children: dict[str, int], end: float, memory: int, isolated: bool
) -> dict[str, Any]:
    """Wait until the judge ends, or without one the program; then end what remains."""
    handles = {name: os.pidfd_open(pid) for name, pid in children.items()}
    poll = select.poll()
    for fd in (boss.fileno(), handles.get("judge", handles["program"])):
        poll.register(fd, select.POLLIN)
    reason = "exit"
    while True:
        left = end - time.monotonic()
        ready = [fd for fd, _ in poll.poll(max(0, min(TURN, left)) * 1000)]
        if boss.fileno() in ready:
            reason = "stopped"
        elif not ready and left <= 0:
            reason = "time"
        elif not ready and _resident(children, isolated) > memory:
            reason = "memory"
        elif not ready:
            continue
        break
    return {"end": reason} | _end(children, reason, isolated)


def _end(children: dict[str, int], reason: str, isolated: bool) -> dict[str, Any]:
    """Kill the children, and say how they ended by themselves."""
    ends: dict[str, Any] = {}
    for name, pid in children.items():
        if name == "program" and "judge" not in children and reason == "exit":
            pass  # it has ended
        elif name != "judge" or reason != "exit":
            os.kill(pid, signal.SIGKILL)
        if not isolated:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        ends[name] = os.waitstatus_to_exitcode(status)
        ends[f"{name}_cpu"] = usage.ru_utime + usage.ru_stime
    while not isolated:  # processes that left the group are children of this one by now
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for pid in map(int, file.read().split()):
                    os.kill(pid, signal.SIGKILL)
            os.wait()
        except OSError:
            break
    return ends


def _resident(children: dict[str, int], isolated: bool) -> int:
    """Return the memory of all processes of the program and its judge, in bytes.

    Pages that are swapped out count as well.
    """
    pids = {str(pid) for pid in children.values()}
    if isolated:
        mine = {"1", str(os.getpid()), str(os.getppid())}
        pids = {name for name in os.listdir("/proc") if name.isdigit()} - mine
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status") as file:
                lines = [line.split() for line in file if line.startswith(("VmRSS:", "VmSwap:"))]
                total += sum(int(kibibytes) << 10 for _, kibibytes, _ in lines)
        except OSError:
            continue
    return total
