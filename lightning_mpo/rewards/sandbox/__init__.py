"""A sandbox for programs that a model wrote.

Threat model: the program is hostile. It knows this code, and it wants to pass without being right.
It wants to read or change something outside, to take memory or time from the run, or to spoil the
judgement of another program. It may run any Python, start processes and call the kernel.

What decides is out of its reach. The tests run in a process of their own (`inside/judge.py`) that
untrusted code never enters. They call the program through a socket. Arguments and results cross as
JSON and are built anew from built-in types, so no method of the program takes part in a comparison.
The program can only answer calls. It never sees a test, and a right answer is the only one that
passes. For scripts, standard output is compared in the process of the run. Exit codes and printed
words prove nothing.

Each program has, at the level `bubblewrap`:

* a fork of a fresh interpreter that has run no other program. It is the first process of a process
  namespace, so that all its descendants end with it, and it sees no process but these;
* a read-only file system with the system and the interpreter alone, without /proc, installed
  packages and home folders;
* standard streams and an IPC namespace of its own, no shared memory but files in /tmp;
* an empty folder /tmp in memory, of bounded size;
* no network, no privileges, a filter of system calls, an environment without variables of the run;
* an identity of its own if root starts it, else a user namespace;
* limits (`Limits`) that the kernel or the keeper (`inside/zygote.py`) enforces from outside.

A sandbox is reused. The process that waits in it runs no untrusted code and is out of sight. Files,
processes and shared memory of a program end with it.

Not protected: a bug in the kernel or the processor gets a program out. Timing and load are visible
to others. A program can take its full limits of time and memory each time, and 300 MiB
in buffers of sockets and pipes. Tests of the data set
run with the same limits and without a network, and are believed: a test that accepts everything
accepts everything. At the level `limits`, which must be allowed (`strongest_level`), a program has
the files of the user and may spoil other processes of the user.
"""

from lightning_mpo.rewards.sandbox.jobs import Job, Result
from lightning_mpo.rewards.sandbox.levels import Level, strongest_level
from lightning_mpo.rewards.sandbox.limits import Limits
from lightning_mpo.rewards.sandbox.pool import Pool

__all__ = ["Job", "Level", "Limits", "Pool", "Result", "strongest_level"]
