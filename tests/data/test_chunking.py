"""Chunks of solutions: no character is lost, parts are merged evenly, and each kind of place is found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mpo.data.chunking import Delimiters, WrittenParts, merge_evenly
from lightning_mpo.errors import UserError

TEXTS = st.text(alphabet="a1.)#*-!?,; \n\t", max_size=60)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(text=TEXTS, chunks=st.integers(1, 6))
def test_chunks_in_a_row_are_the_text(text, chunks):
    for splitter in (WrittenParts(), Delimiters()):
        parts = splitter.split(text, chunks)
        merged = merge_evenly(parts, chunks)
        assert "".join(parts) == "".join(merged) == text
        assert 1 <= len(merged) <= chunks
        assert all(part.strip() for part in parts) or not text.strip()


@settings(derandomize=True, max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 9))
def test_parts_are_merged_evenly(m, n):
    merged = merge_evenly(["x"] * m, n)
    assert len(merged) == min(m, n)
    assert sum(map(len, merged)) == m
    assert max(map(len, merged)) - min(map(len, merged)) <= 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. More\nhere.\n\nTwo.\n \nThree.", ["One. More\nhere.\n\n", "Two.\n \n", "Three."]),
        ("We see:\n1. a b\n2. c\n(3) d", ["We see:\n", "1. a b\n", "2. c\n", "(3) d"]),
        ("Step 1: a\nb\nStep 2: c\nStep 3 d", ["Step 1: a\nb\n", "Step 2: c\n", "Step 3 d"]),
        ("# Sum\na\n## Half\nb\n**Last**\nc", ["# Sum\na\n", "## Half\nb\n", "**Last**\nc"]),
        ("It is 3.5 m. Then 4!  So 5.", ["It is 3.5 m.", " Then 4!", "  So 5."]),
        ("48/2 = 24\n48+24 = 72\n#### 72", ["48/2 = 24\n", "48+24 = 72\n", "#### 72"]),
        ("\n One. Two. Three.\n", ["\n One.", " Two.", " Three.\n"]),
    ],
)
def test_paragraphs_items_headings_and_sentences(text, parts):
    assert WrittenParts().split(text, 3) == parts


def test_the_first_kind_with_enough_parts_is_taken_else_the_one_with_the_most():
    text = "A. B.\n\nC. D."
    assert WrittenParts().split(text, 2) == ["A. B.\n\n", "C. D."]
    assert WrittenParts().split(text, 3) == ["A.", " B.\n\n", "C.", " D."]
    assert WrittenParts().split(text, 9) == ["A.", " B.\n\n", "C.", " D."]
    assert WrittenParts().split("no end", 4) == ["no end"]


def test_delimiters_end_their_parts():
    assert Delimiters(",;").split("1+2,3;4;", 2) == ["1+2,", "3;", "4;"]
    assert Delimiters("]").split("a]b", 2) == ["a]", "b"]


def test_mistakes_end_in_one_line():
    with pytest.raises(UserError, match="`Delimiters.characters` must hold at least one"):
        Delimiters("")
    with pytest.raises(UserError, match=r"`merge_evenly.chunks` must be at least 1"):
        merge_evenly(["a"], 0)
