"""Confines a process: its view of the file system, limits, identity, privileges, system calls."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import struct
from collections.abc import Sequence
from typing import NamedTuple

from lightning_mpo.rewards.sandbox.inside import seccomp

NEW_MOUNTS, NEW_IPC, NEW_PIDS = 0x20000, 0x8000000, 0x20000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_PROGRAMS, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
SET_DUMPABLE, SET_SUBREAPER, CLEAR_AMBIENT = 4, 36, (47, 4, 0, 0, 0)
STACK = 64 << 20


class Confinement(NamedTuple):
    """Limits of one process, and of the processes that it starts."""

    seconds: float  # CPU time
    memory: int  # bytes
    processes: int  # processes and threads
    disk: int  # bytes
    isolated: bool  # namespaces are at hand
    user: int | None  # identity to change to; None: keep the present one


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def hide_memory() -> None:
    """Forbid other processes of the same user to read the memory of this one."""
    call("prctl", SET_DUMPABLE, 0, 0, 0, 0)


def end_first() -> None:
    """Have the kernel end this process and its children first where memory is short."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    call("prctl", SET_SUBREAPER, 1, 0, 0, 0)


def protect_devices() -> None:
    """Keep programs from changing the times of devices, which the machine has as well."""
    for name in os.listdir("/dev"):
        path = os.path.join("/dev", name)
        if not os.path.isdir(path):
            options = REMOUNT | BIND | READ_ONLY | NO_SUID | NO_PROGRAMS
            call("mount", None, path.encode(), None, options, None)


def limit_to(kind: int, soft: int, hard: int) -> None:
    """Set a limit, or keep one that is lower already."""
    present = resource.getrlimit(kind)[1]
    if present != resource.RLIM_INFINITY:
        hard = min(hard, present)
    resource.setrlimit(kind, (min(soft, hard), hard))


def confine(to: Confinement, keep: Sequence[int], folder: str = "/tmp") -> None:
    """Give up everything that a program does not need. There is no way back.

    Args:
        to: the limits.
        keep: file descriptors that become 3, 4, …; all others above 2 are closed.
        folder: working folder, private to the program.
    """
    # no inherited files, and standard streams that no other process has
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    spare = [os.dup2(fd, 64 + i) for i, fd in enumerate(keep)]
    for i, fd in enumerate(spare):
        os.dup2(fd, 3 + i)
    os.closerange(3 + len(keep), 4096)
    # a file system with one writable folder
    if to.isolated:
        call("unshare", NEW_MOUNTS | NEW_IPC)
        options = f"size={to.disk},nr_inodes=2000,mode=1777".encode()
        call("mount", b"tmpfs", b"/tmp", b"tmpfs", NO_SUID | NO_DEVICES, options)
        call("mount", b"/tmp", b"/dev/shm", None, BIND, None)
        for place in (b"/proc", b"/sandbox/inside"):  # covered, as some mounts are locked
            call("mount", b"tmpfs", place, b"tmpfs", READ_ONLY, b"size=4k,nr_inodes=1,mode=0")
    os.chdir(folder)
    # limits
    seconds = max(1, math.ceil(to.seconds))
    for name, limit in (
        ("AS", to.memory),
        ("CPU", seconds),
        ("FSIZE", to.disk),
        ("NOFILE", 64),
        ("NPROC", to.processes),
        ("CORE", 1),  # 0 would still start a program of the host that collects core files
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        limit_to(getattr(resource, f"RLIMIT_{name}"), limit, limit)
    limit_to(resource.RLIMIT_STACK, 8 << 20, STACK)
    # identity, privileges, system calls
    if to.user is not None:
        os.setgroups([])
        os.setresgid(to.user, to.user, to.user)
        os.setresuid(to.user, to.user, to.user)
    call("prctl", *CLEAR_AMBIENT)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    if seccomp.supported():
        seccomp.install(None if to.isolated else os.getpid())


_libc = ctypes.CDLL(None, use_errno=True)
