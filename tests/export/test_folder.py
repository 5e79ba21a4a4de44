"""A folder of an earlier export is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.export import check_target
from lightning_mpo.export.folder import begin, finish
from lightning_mpo.storage import PART, Disk


def test_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is not empty \(it holds 'adapter_config.json'\); name another, or pray"
    ):
        check_target(tmp_path, False, "pray")
    check_target(tmp_path, True, "pray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "thesis.txt"]


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A folder with an earlier export and other files."""
    (tmp_path / "out" / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "deep" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine too")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    return tmp_path / "out"


def write(folder: Path) -> None:
    (begin(folder) / "config.json").write_text("new")
    finish(folder)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


KEPT = {"mine/deep/thesis.txt": "mine", "notes.txt": "mine too"}


@pytest.mark.parametrize("links", [True, False])
def test_what_exports_wrote_is_replaced_and_nothing_else(earlier, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            "os.link", Mock(side_effect=PermissionError(1, "Operation not permitted"))
        )
    write(earlier)
    assert files(earlier) == KEPT | {"config.json": "new"}, (
        "an adapter must not stay beside a whole model"
    )
    assert [path.name for path in earlier.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_at_any_renaming_loses_nothing(earlier, monkeypatch, renamed):
    class Killed(BaseException):
        pass

    rename, left = Disk.rename, [renamed]

    def dying(self, source, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        rename(self, source, target)
        if left[0] == 0 and source.name.endswith(PART):
            raise Killed

    before = files(earlier)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rename", dying)
        with pytest.raises(Killed):
            write(earlier)
    check_target(earlier, True, "")
    assert files(earlier) == (before if renamed < 2 else KEPT | {"config.json": "new"})
    write(earlier)
    assert files(earlier) == KEPT | {"config.json": "new"}
    assert [path.name for path in earlier.parent.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_one(earlier):
    link = earlier.with_name("link")
    link.symlink_to(earlier)
    write(link)
    assert link.is_symlink()
    assert files(earlier) == KEPT | {"config.json": "new"}


def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for folder in (Path(), tmp_path):
        with pytest.raises(
            UserError,
            match=rf"'{folder}' is the working folder and cannot be replaced; name one inside",
        ):
            check_target(folder, True, "")
    with pytest.raises(UserError, match="'/' is mounted and cannot be replaced"):
        check_target(Path("/"), True, "")
    begin(tmp_path / "out")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(16, "Device or resource busy")))
    with pytest.raises(
        UserError,
        match=r"the export in .*/\.out\.part could not take the place of .*/out: Device or",
    ):
        finish(tmp_path / "out")


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/nowhere")):
        with pytest.raises(
            UserError, match=rf"the target folder '{folder}' cannot be written to: \w+"
        ):
            check_target(folder, False, "")
    (tmp_path / "closed").mkdir()

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_mpo.export.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        check_target(tmp_path / "closed", False, "")
