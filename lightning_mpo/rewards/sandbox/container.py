"""One sandbox: a process that waits for programs, and the sockets to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.sandbox.inside import frames
from lightning_mpo.rewards.sandbox.jobs import Job, Result
from lightning_mpo.rewards.sandbox.levels import ENVIRONMENT, Level, user_of_programs
from lightning_mpo.rewards.sandbox.limits import MIB, Limits

START_SECONDS, GRACE_SECONDS, REPORT = 120.0, 60.0, 1 << 16


class Sandbox:
    """One sandbox. It runs one program at a time.

    Args:
        level: how programs are isolated.
        limits: of each program.

    Raises:
        UserError: it does not start.
    """

    def __init__(self, level: Level, limits: Limits) -> None:
        self.level, self.limits = level, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._start()

    def run(self, job: Job, stdin: str | None = None) -> Result:
        """Run one program.

        Args:
            job: its text, and its tests.
            stdin: standard input of a script; None: its functions are tested.
        """
        if self._process is None:
            self._start()
        folder = "/tmp" if self.level.isolated else self._new_folder()
        try:
            result = self._exchange(job, stdin, folder)
        except (OSError, ValueError, frames.BrokenLinkError):
            result = Result("lost")
        finally:
            if not self.level.isolated:
                shutil.rmtree(folder, ignore_errors=True)
        if result.end == "lost":  # nothing watches what still runs in it
            self.close()
        return result

    def close(self) -> None:
        """End the sandbox and everything in it."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def forget(self) -> None:
        """Leave the sandbox to another process."""
        if self._control is not None:
            self._control.close()
        self._process = self._control = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(START_SECONDS)
        self._user = user_of_programs(os.getpid() * 64 + theirs.fileno())
        with theirs, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                self.level.command(theirs.fileno(), self._user),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            self._control = ours
            try:
                started = bool(ours.recv(REPORT))
            except OSError:
                started = False
            if not started:
                self.close()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "no message")
                raise UserError(f"the sandbox for programs does not start: {last[:300]}")

    def _new_folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="program-")
        if self._user is not None:
            os.chown(folder, self._user, self._user)
        return folder

    def _exchange(self, job: Job, stdin: str | None, folder: str) -> Result:
        """Send a program and its tests; return the verdict."""
        assert self._control is not None
        # hand over one end of each socket
        pairs = [socket.socketpair() for _ in range(1 if stdin is not None else 2)]
        for mine, _ in pairs:
            mine.settimeout(self.limits.wall_seconds + GRACE_SECONDS)
        self._control.settimeout(self.limits.wall_seconds + GRACE_SECONDS)
        try:
            request = json.dumps(self._request(folder)).encode()
            socket.send_fds(self._control, [request], [theirs.fileno() for _, theirs in pairs])
            for _, theirs in pairs:
                theirs.close()
            # send the program and the tests
            source = {"sources": job.sources, "stdin": stdin}
            verdict: dict[str, Any] = {}
            output = b""
            try:
                frames.send(pairs[0][0], source)
                if stdin is None:
                    pairs[0][0].close()
                    self._judge(job, pairs[1][0], verdict)
                else:
                    output = self._read(pairs[0][0], verdict)
            except (BrokenPipeError, ConnectionResetError, frames.BrokenLinkError):
                pass  # the report has the reason
            report = json.loads(self._control.recv(REPORT))
        finally:
            for pair in pairs:
                for side in pair:
                    side.close()
        return self._result(verdict, output, report)

    def _request(self, folder: str) -> dict[str, Any]:
        return {
            "folder": folder,
            "seconds": self.limits.seconds,
            "wall": self.limits.wall_seconds,
            "memory": self.limits.memory_mib * MIB,
            "processes": self.limits.processes,
            "disk": self.limits.disk_mib * MIB,
            "output": self.limits.output_mib * MIB,
        }

    def _judge(self, job: Job, judge: socket.socket, verdict: dict[str, Any]) -> None:
        """Send the tests; add the messages of the judge to the verdict."""
        tests = {"setup": job.setup, "tests": job.tests, "entry": job.entry, "each": job.each}
        frames.send(judge, tests)
        for _ in ("compiled", "counts"):
            verdict.update(frames.receive(judge, REPORT))

    def _read(self, script: socket.socket, verdict: dict[str, Any]) -> bytes:
        """Return standard output, at most as much as allowed."""
        verdict.update(frames.receive(script, REPORT))
        parts, size = list[bytes](), 0
        while part := script.recv(1 << 16):
            parts.append(part)
            size += len(part)
            if size > self.limits.output_mib * MIB:
                verdict["end"] = "output"
                assert self._control is not None
                self._control.send(b"{}")
                break
        return b"".join(parts)

    def _result(self, verdict: dict[str, Any], output: bytes, report: dict[str, Any]) -> Result:
        end = verdict.get("end") or report["end"]
        status = int(report.get("program", 0))
        used = max(report.get("program_cpu", 0.0), report.get("judge_cpu", 0.0))
        if end == "exit" and used >= self.limits.seconds:
            end = "time"
        elif end == "exit" and (not verdict or verdict.get("lost")):
            end = "crash"
        return Result(
            end=end,
            compiled=bool(verdict.get("compiled")),
            passed=int(verdict.get("passed", 0)),
            total=int(verdict.get("total", 1)),
            output=output,
            status=status,
            broken=str(verdict.get("broken", "")),
        )
