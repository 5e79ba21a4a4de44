"""Thoughts in files: the same programs, and the same bytes without them."""

from __future__ import annotations

import ast
import json

import pytest

from lightning_mpo.data.annotations import (
    SIDE_FILE,
    annotate_folder,
    strip_folder,
    with_thoughts,
    without_lines,
)
from lightning_mpo.data.code_files import CodeFile, code_file, indentation, read_paths
from lightning_mpo.errors import UserError
from tests.support.code_corpus import GOOD, STARTS, write_corpus


def every_line(file: CodeFile) -> dict[int, str]:
    """Invent a thought for each statement, some like code, one with letters of another script."""
    kinds = ("# note {}", "#{}", "# return x  # {}", '# """ {}', "# ü\u2028 {} \\")
    return {i: kinds[n % 5].format(n) for n, i in enumerate(file.starts)}


def test_comments_stand_at_the_column_of_their_line():
    file = code_file(GOOD.encode(), "a.py")
    text, added = with_thoughts(file, every_line(file))
    lines = text.split("\n")
    assert len(added) == len(STARTS)
    for i in added:
        assert indentation(lines[i]) == indentation(lines[i + 1])
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(GOOD))
    assert without_lines(text, added) == GOOD


def test_acts_alone_leave_all_bytes(tmp_path):
    """What an infinite cost leads to."""
    folder = write_corpus(tmp_path / "code")
    annotate_folder([str(folder)], tmp_path / "out", lambda file: {})
    for path, name, _ in read_paths([str(folder)]):
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()


def forth_and_back(paths, tmp_path, max_files=None):
    done = annotate_folder(paths, tmp_path / "out", every_line, max_files)
    back = strip_folder(tmp_path / "out", tmp_path / "back")
    assert back.thoughts == done.thoughts
    changed = 0
    for path, name, file in read_paths(paths, max_files):
        data, annotated = path.read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == data
        if not isinstance(file, str):
            ast.parse(annotated)
            assert annotated.count(b"\n") == data.count(b"\n") + len(file.starts)
            changed += 1
    return done, changed


def test_a_folder_forth_and_back(tmp_path):
    folder = write_corpus(tmp_path / "code")
    done, changed = forth_and_back([str(folder)], tmp_path)
    assert (done.files, changed) == (17, 12)
    assert "1 do not parse" in done.skipped


def test_the_standard_library_forth_and_back(tmp_path):
    assert forth_and_back(["stdlib"], tmp_path, 3)[1] == 3


@pytest.mark.slow
def test_200_files_of_the_standard_library_forth_and_back(tmp_path):
    done, changed = forth_and_back(["stdlib"], tmp_path, 200)
    assert changed == 200
    assert done.thoughts > 10_000


def test_what_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "code", 2)
    out = tmp_path / "out"
    annotate_folder([str(folder)], out, every_line)
    with pytest.raises(UserError, match="is there and not an empty folder; give another one"):
        annotate_folder([str(folder)], out, every_line)
    with pytest.raises(UserError, match=f"has no {SIDE_FILE}; give a folder that `annotate` wrote"):
        strip_folder(folder, tmp_path / "a")
    # a file that has changed, or is gone
    file = out / "file_0.py"
    kept = file.read_bytes()
    file.write_bytes(kept + b"\n")
    with pytest.raises(UserError, match=r"file_0.py' has changed since it was annotated"):
        strip_folder(out, tmp_path / "b")
    file.unlink()
    with pytest.raises(UserError, match=r"file_0.py' is missing, which thoughts.json lists"):
        strip_folder(out, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    # a list that leaves the folder
    for listed in ("{", "[]", json.dumps({"files": {"../x": {"lines": [], "sha256": ""}}})):
        (out / SIDE_FILE).write_text(listed)
        with pytest.raises(UserError, match="is damaged"):
            strip_folder(out, tmp_path / "b")
    # one name twice
    write_corpus(tmp_path / "other", 2)
    with pytest.raises(UserError, match="two files of the corpus are called"):
        annotate_folder([str(folder), str(tmp_path / "other")], tmp_path / "c", every_line)


@pytest.mark.parametrize("thoughts", [{1: "# x"}, {0: "x"}, {0: "# a\n# b"}])
def test_no_comment_line_in_front_of_a_statement(thoughts):
    file = code_file(b"x = [\n1]\n", "a.py")
    with pytest.raises(ValueError, match="no comment line in front of a statement"):
        with_thoughts(file, thoughts)
