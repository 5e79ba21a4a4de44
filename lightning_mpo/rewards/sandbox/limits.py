"""The limits of one program."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mpo.checks import at_least, positive

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one program may use. A program beyond a limit is ended.

    Args:
        seconds: CPU time of one process of the program.
        wall_seconds: time of the clock, tests included; also ends a program that sleeps.
        memory_mib: address space of one process, and resident memory of all its processes.
        processes: processes and threads.
        disk_mib: all files of its private folder together.
        output_mib: standard output, and each value that a call returns.

    Raises:
        UserError: a limit is no number, not positive, or beyond reason.
    """

    seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_mib: int = 1024
    processes: int = 16
    disk_mib: int = 64
    output_mib: int = 4

    def __post_init__(self) -> None:
        positive("limits", most=86_400, seconds=self.seconds, wall_seconds=self.wall_seconds)
        at_least("limits", 64, most=1 << 20, memory_mib=self.memory_mib)
        at_least("limits", 1, most=4096, processes=self.processes)
        at_least("limits", 1, most=1 << 14, disk_mib=self.disk_mib, output_mib=self.output_mib)
