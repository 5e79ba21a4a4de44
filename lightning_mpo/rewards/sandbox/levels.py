"""How well this machine can isolate a program, and the command that starts a sandbox.

There are two levels. `bubblewrap` holds everything that the docstring of the package promises.
`limits` has no private file system and no namespaces: a program sees the files that the user sees.
It is refused unless it is allowed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.sandbox.inside import seccomp

INSIDE = Path(__file__).parent / "inside"
PACKAGES = ("lightning_mpo", "lightning_mpo.rewards", "lightning_mpo.rewards.sandbox")
START = """
import sys, types
for name in {packages}:
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [{folder!r}]
from lightning_mpo.rewards.sandbox.inside.zygote import main
main({control}, {isolated}, {user})
"""
"""The start of a sandbox: stand-ins for the packages above `inside`, which import torch."""
CAPABILITIES = ("SYS_ADMIN", "SETUID", "SETGID", "KILL", "SETPCAP")
"""Privileges of the process that confines programs; programs have none."""
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
"""Not `/dev/zero`, whose shared mappings need not count as memory of any process."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Level:
    """A way to isolate programs.

    Args:
        name: in messages.
        isolated: namespaces and a private file system.
        bubblewrap: path of `bwrap`; empty: not used.
    """

    name: str
    isolated: bool
    bubblewrap: str = ""

    def command(self, control: int, user: int | None) -> list[str]:
        """Return the command that starts a sandbox.

        Args:
            control: descriptor of the socket for requests.
            user: identity of programs; None: the present one.
        """
        folder = "/sandbox" if self.isolated else str(INSIDE.parent)
        start = START.format(
            packages=PACKAGES, folder=folder, control=control, isolated=self.isolated, user=user
        )
        python = [str(_interpreter()), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", start]
        return [self.bubblewrap, *_walls(), "--", *python] if self.isolated else python


def strongest_level(allow_weak: bool) -> Level:
    """Return the strongest level that works here.

    Args:
        allow_weak: accept the level `limits`.

    Raises:
        UserError: only the level `limits` works, and it is not allowed; or this is not Linux.
    """
    if platform.system() != "Linux":
        raise UserError("programs of the model can be run on Linux only")
    level, obstacle = _bubblewrap()
    if level is not None:
        return level
    if not allow_weak:
        raise UserError(
            f"programs of the model cannot be isolated here: {obstacle}. Install bubblewrap "
            "(`apt-get install bubblewrap`), or set `allow_weak: true` to run them with the rights "
            "of this user, where they can read all its files"
        )
    closed = [folder for folder in _library().parents if not folder.stat().st_mode & 1]
    if os.getuid() == 0 and closed:
        raise UserError(
            f"programs must not run as root, and other users cannot read {closed[0]}, where Python "
            "is: install bubblewrap, or use the Python of the system"
        )
    return Level(f"limits alone, as {obstacle}", isolated=False)


@lru_cache
def _bubblewrap() -> tuple[Level | None, str]:
    """Return the level, or None and the obstacle."""
    path = shutil.which("bwrap")
    if path is None:
        return None, "bubblewrap is not installed"
    if not seccomp.supported():
        return None, "system calls can be filtered on x86-64 and arm64 only"
    test = [path, *_walls(), "--", str(_interpreter()), "-I", "-S", "-c", "print(7)"]
    try:
        done = subprocess.run(test, capture_output=True, text=True, timeout=60, env={}, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"bubblewrap does not start ({error})"
    if done.stdout != "7\n":
        last = (done.stderr.strip().splitlines() or ["it prints nothing"])[-1]
        return None, f"bubblewrap does not work ({last})"
    return Level("bubblewrap", isolated=True, bubblewrap=path), ""


def user_of_programs(unique: int) -> int | None:
    """Return an identity for programs that no other process has; None: only root can change it.

    The kernel counts the processes of a user, so two sandboxes must not share one.

    Args:
        unique: a number that differs between sandboxes, such as the id of a process.
    """
    if os.getuid() != 0:
        return None
    mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if any(int(first) == 0 and int(count) > 1 << 31 for first, _, count in mapped):
        return (1 << 30) + 2 * (unique % (1 << 28))
    return 61_200 + 2 * (unique % 1000)


def _library() -> Path:
    """Return a file of the standard library."""
    return Path(os.__file__).resolve()


def _interpreter() -> Path:
    """Return the interpreter without its virtual environment."""
    return Path(vars(sys).get("_base_executable") or sys.executable).resolve()


def _walls() -> list[str]:
    """Return the options of `bwrap`: namespaces, the file system, privileges."""
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    walls = [*options.split(), "--hostname", "sandbox", "--clearenv"]
    if os.getuid() != 0:
        walls.append("--unshare-user")
    for name, value in ENVIRONMENT.items():
        walls += ["--setenv", name, value]
    # the system and the interpreter, read-only
    for folder in ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/nix/store"):
        path = Path(folder)
        if path.is_symlink():
            walls += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            walls += ["--ro-bind", folder, folder]
    walls += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    visible = [Path("/usr"), Path("/nix/store")]
    for place in dict.fromkeys(
        (sys.base_prefix, sys.base_exec_prefix, str(_interpreter().parents[1]))
    ):
        prefix = Path(place)
        if not any(prefix.is_relative_to(folder) for folder in visible):
            for parent in reversed(prefix.parents[:-1]):  # bubblewrap makes closed ones
                walls += ["--dir", str(parent)]
            walls += ["--ro-bind", str(prefix), str(prefix)]
            visible.append(prefix)
    # installed packages, and this one, are not to be seen
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    hidden = {Path(sysconfig.get_path(name, vars=base)) for name in ("purelib", "platlib")}
    for packages in sorted(hidden | {Path(__file__).parents[3]}):
        if packages.is_dir() and any(packages.is_relative_to(seen) for seen in visible):
            walls += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    # devices, processes, the code of the sandbox; privileges
    walls += ["--dir", "/dev", "--dir", "/dev/shm", "--dir", "/tmp"]
    for device in DEVICES:
        walls += ["--dev-bind", device, device]
    walls += ["--ro-bind", str(INSIDE), "/sandbox/inside"]
    walls += ["--proc", "/proc", "--remount-ro", "/", "--cap-drop", "ALL"]
    for name in CAPABILITIES:
        walls += ["--cap-add", f"CAP_{name}"]
    return walls
