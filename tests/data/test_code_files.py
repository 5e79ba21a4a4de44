"""Python files of a corpus: which are read, and where their statements begin."""

from __future__ import annotations

import ast

import pytest

from lightning_mpo.data.code_files import (
    code_file,
    lines_of,
    pieces_of,
    read_corpus,
    share_of,
    statement_starts,
)
from lightning_mpo.errors import UserError
from tests.support.code_corpus import GOOD, STARTS, write_corpus


def test_statements_begin_where_a_comment_changes_nothing():
    lines, tree = lines_of(GOOD), ast.dump(ast.parse(GOOD))
    starts = statement_starts(GOOD)
    assert [lines[i].strip() for i in starts] == STARTS
    for i in starts:
        commented = "".join([*lines[:i], "# a thought\n", *lines[i:]])
        assert ast.dump(ast.parse(commented)) == tree
    # within a text it would
    inside = next(i for i, line in enumerate(lines) if line.startswith("  text"))
    assert ast.dump(ast.parse("".join([*lines[:inside], "# no\n", *lines[inside:]]))) != tree


@pytest.mark.parametrize(
    "text", [GOOD, "", "\n\n", "\nx", "a\fb\x0b\u2028\nc\n\n", "x\n \n\ny = 1"]
)
def test_lines_and_pieces_are_the_text(text):
    assert "".join(lines_of(text)) == "".join(pieces_of(text)) == text
    assert all("\n" not in line[:-1] for line in lines_of(text))
    # each piece but for the first begins with a line that is not blank
    assert all(piece.split("\n", 1)[0].strip() for piece in pieces_of(text)[1:])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"def f(:\n", "do not parse"),
        (b"x = 1\0\n", "do not parse"),
        (b"if x:\n\ty = 1\n", "indented by tabs"),
        (b"if x:\n    if y:\n    \tz = 1\n", "indented by tabs"),
        (b"x = '\xe9'\n", "not UTF-8"),
        (b"x = 1\r\n", "with carriage returns or a byte order mark"),
        (b"\xef\xbb\xbfx = 1\n", "with carriage returns or a byte order mark"),
    ],
)
def test_reasons_to_skip_a_file(data, reason):
    assert code_file(data, "a.py") == reason


def test_a_folder_and_a_pattern_are_read_alike(tmp_path):
    folder = write_corpus(tmp_path / "code")
    corpus = read_corpus([str(folder)])
    assert [file.name for file in corpus.files] == sorted(
        f"inner/file_{n}.py" if n % 2 else f"file_{n}.py" for n in range(12)
    )
    assert sum(corpus.skipped.values()) == 5
    assert corpus.skipped["do not parse"] == corpus.skipped["without a statement"] == 1
    assert read_corpus([f"{folder}/**/*.py", str(folder)]) == corpus
    # a part is the same for any order, and a part of a larger part
    few, more = read_corpus([str(folder)], 3), read_corpus([str(folder)], 7)
    assert len(few.files) == 3
    assert set(few.files) < set(more.files) < set(corpus.files)


@pytest.mark.parametrize(
    ("path", "message"),
    [("none/**/*.py", "names no Python file; give a folder"), ("notes", "can be used \\(1 do not")],
)
def test_no_file(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.py").write_text("(")
    with pytest.raises(UserError, match=message):
        read_corpus([path])


def test_the_standard_library_is_a_corpus():
    corpus = read_corpus(["stdlib"], max_files=4)
    assert len(corpus.files) == 4
    assert not any("test" in file.name.split("/")[:-1] for file in corpus.files)


def test_shares_are_uniform_and_depend_on_text_and_seed_alone():
    shares = [share_of(str(i), 0) for i in range(2000)]
    assert shares == [share_of(str(i), 0) for i in range(2000)]
    assert abs(sum(share < 0.1 for share in shares) / 2000 - 0.1) < 0.03
    assert shares[0] != share_of("0", 1)
