"""One run per folder."""

from __future__ import annotations

import os

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.storage.lock import NAME, FolderLock


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path):
    folder = tmp_path / "a" / "b"
    first = FolderLock(folder)
    with pytest.raises(
        UserError, match=rf"another run \(process {os.getpid()}\) is writing to '{folder}'"
    ):
        FolderLock(folder)
    first.release()
    FolderLock(folder).release()
    assert list(tmp_path.iterdir()) == [], "nothing is left of a run that wrote nothing"


def test_the_kernel_releases_what_a_killed_process_held(tmp_path):
    pid = os.fork()
    if pid == 0:
        FolderLock(tmp_path)
        os._exit(9)
    os.waitpid(pid, 0)
    assert (tmp_path / NAME).exists()
    lock = FolderLock(tmp_path)
    (tmp_path / "metrics.csv").write_text("")
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
