"""The verdict on each hostile program, as a table.

    python benchmarks/hostile.py [--table forged] [--seconds 2]

Each program runs in a sandbox, and a good one after it in the same sandbox. A hostile program must
not pass, and the good one must. The exit code is 1 if that is not so. The last line has the good
programs per second, and the CPU time of each.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mpo.rewards.sandbox import Job, Limits, Pool, strongest_level
from tests.support import hostile
from tests.support.sandboxes import GOOD, adding

TABLES = ("forged", "machine", "leaks", "endless", "scripts")
GOOD_RUNS = 100


def job_of_table(table: str, code: str) -> Job:
    """Return a program with its tests; a script reads two numbers and prints their sum."""
    return Job((code,), (("2 3", "5"),)) if table == "scripts" else adding(code)


def cpu_seconds(pool: Pool) -> float:
    """Return the CPU time of the sandboxes and of this process so far."""
    tops = [psutil.Process(box._process.pid) for box in pool._open if box._process is not None]
    times = [child.cpu_times() for top in tops for child in top.children(recursive=True)]
    inside = sum(t.user + t.system + t.children_user + t.children_system for t in times)
    return inside + time.process_time()


def main() -> int:
    """Print the table; return 1 if a program passes, or harms the next."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", choices=TABLES, action="append")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of a program")
    options = parser.parse_args()
    limits = Limits(options.seconds, 3 * options.seconds, 512, disk_mib=16, output_mib=1)
    pool = Pool(strongest_level(allow_weak=False), limits, 1)
    pool.run([GOOD])
    faults = count = 0
    print(f"{'table':8} {'program':54} {'end':7} {'passed':>6} {'seconds':>7}  next")
    for table in options.table or TABLES:
        for name, code in getattr(hostile, table.upper()).items():
            begin = time.monotonic()
            (result,) = pool.run([job_of_table(table, code)])
            seconds = time.monotonic() - begin
            is_good = pool.run([GOOD])[0].all_passed
            count, faults = count + 1, faults + (result.passed > 0 or not is_good)
            verdict = f"{result.end:7} {result.passed:6} {seconds:7.2f}  "
            print(f"{table:8} {name:54} {verdict}{'good' if is_good else 'HARMED'}", flush=True)
    print(f"{count} programs, {faults} faults")
    # speed
    begin, before = time.monotonic(), cpu_seconds(pool)
    pool.run([GOOD] * GOOD_RUNS)
    rate = GOOD_RUNS / (time.monotonic() - begin)
    each = (cpu_seconds(pool) - before) / GOOD_RUNS
    print(f"{rate:.0f} good programs per second in one sandbox, {each:.4f} s CPU for each")
    pool.close()
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
