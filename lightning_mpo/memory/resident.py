"""Memory of this process by phase: the resident set, and the CUDA allocator's bytes."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil


def resident_bytes() -> int:
    """Return the resident set size of this process."""
    return int(psutil.Process().memory_info().rss)


class _HeapCounts(ctypes.Structure):
    """The struct mallinfo2 of glibc; `fordblks` are the free bytes that the heap keeps."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _find_mallinfo() -> Callable[[], _HeapCounts] | None:
    if not sys.platform.startswith("linux"):
        return None
    mallinfo = getattr(
        ctypes.CDLL(None), "mallinfo2", None
    )  # glibc from 2.33 on; other C libraries have none
    if mallinfo is not None:
        mallinfo.restype = _HeapCounts
    return mallinfo


_mallinfo = _find_mallinfo()


def heap_free_bytes() -> int:
    """Return the free bytes that the heap keeps; 0 if the C library does not report them."""
    return int(_mallinfo().fordblks) if _mallinfo is not None else 0


@dataclass
class Peak:
    """The largest values of a phase, in bytes; CUDA's are 0 without it.

    Args:
        resident: the resident set.
        in_use: the resident set without free bytes of the heap. A heap keeps holes too small
            for the next tensor, so it holds more bytes than were ever in use.
        allocated: bytes of tensors, by CUDA's allocator.
        reserved: bytes that CUDA's allocator has taken from the device.
    """

    resident: int = 0
    in_use: int = 0
    allocated: int = 0
    reserved: int = 0

    def take(
        self, resident: int = 0, in_use: int = 0, allocated: int = 0, reserved: int = 0
    ) -> None:
        """Raise each value that is smaller than the argument."""
        self.resident = max(self.resident, resident)
        self.in_use = max(self.in_use, in_use)
        self.allocated = max(self.allocated, allocated)
        self.reserved = max(self.reserved, reserved)


class PhasePeaks:
    """Keeps the peak of each phase of a run.

    A thread reads the resident set every few milliseconds. The kernel's mark (VmHWM) is exact, but
    a reset would change it for all other readers of the process's peak. A peak that lasts less than
    `interval` may be missed. The CUDA allocator counts its own peaks.

    Args:
        cuda: ask the CUDA allocator as well.
        interval: seconds from one reading to the next.
        read: returns the resident set.
        heap_free: returns the free bytes of the heap.
        heap_every: readings of the resident set for one of the heap. A reading locks the heap for
            up to half a millisecond.
    """

    def __init__(
        self,
        cuda: bool = False,
        interval: float = 0.004,
        read: Callable[[], int] = resident_bytes,
        heap_free: Callable[[], int] = heap_free_bytes,
        heap_every: int = 4,
    ) -> None:
        self.cuda, self.interval, self.read, self.heap_free = cuda, interval, read, heap_free
        self.heap_every = heap_every
        self.peaks: dict[str, Peak] = {}
        self.phase: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, phase: str) -> None:
        """Begin with a phase."""
        self.enter(phase)
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")
            self._thread.start()

    def enter(self, phase: str | None) -> None:
        """End the phase under way and begin another; None: nobody's memory until the next."""
        self._read()
        with self._lock:
            self._take_cuda()
            self.phase = phase
        self._read()

    def stop(self) -> None:
        """End the last phase."""
        self.enter(None)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        readings = 0
        while not self._stop.wait(self.interval):
            readings += 1
            self._read(heap=readings % self.heap_every == 0)

    def _read(self, heap: bool = True) -> None:
        resident = self.read()
        in_use = resident - self.heap_free() if heap else 0
        with self._lock:
            if self.phase is not None:
                self.peaks.setdefault(self.phase, Peak()).take(resident=resident, in_use=in_use)

    def _take_cuda(self) -> None:
        if not self.cuda:
            return
        import torch

        if self.phase is not None:
            allocated, reserved = (
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
            )
            self.peaks.setdefault(self.phase, Peak()).take(allocated=allocated, reserved=reserved)
        torch.cuda.reset_peak_memory_stats()
