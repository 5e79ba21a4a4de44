"""Held-out lines of code, and comments that files have in front of lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_mpo.data.code_files import CodeFile, comment_above, read_corpus, share_of
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.rewards.next_line import NextLineLikelihood, copied_share
from lightning_mpo.types import PromptRow

Thought = dict[str, Any]
"""Ids and text of a comment line with its line end, and whether the reward would use it."""


@dataclass(frozen=True)
class CodeRow:
    """A line to measure.

    Args:
        row: the line and its prompt.
        has_comment: its file has a comment in front of it, which the prompt leaves out. Without, it
            is any held-out line, also one whose prompt ends with a comment.
        comments: comments to measure as thoughts, by their source.
    """

    row: PromptRow
    has_comment: bool
    comments: dict[str, list[Thought]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the columns that identify the line in the results."""
        extra = self.row.extra
        named = {"file": extra["file"], "number": extra["number"], "line": extra["line"].strip()}
        return named | {"lines": "with a comment" if self.has_comment else "any"}


class Corpus:
    """The files of a data module: lines of the held-out files, comments of all files.

    Lines with a comment stand behind exactly one comment line of their own indentation, as a
    thought is one line. It is taken out of the file in front of them.

    Args:
        data: connected.
        guard: which comments copy their line; the same rule as for thoughts.
        seed: of the choice of lines and comments.
    """

    def __init__(self, data: CodeLines, guard: NextLineLikelihood, seed: int) -> None:
        self.data, self.guard, self.seed = data, guard, seed
        files = read_corpus(data.paths, data.max_files).files
        self.held_out = [file for file in files if data.holds_out(file)]
        self.texts = [
            (file.name, file.lines[i - 1].strip()) for file in files for i in commented(file)
        ]

    def rows(self, count: int) -> list[CodeRow]:
        """Return at most `count` lines of each kind, chosen by a hash."""
        plain = self._chosen(list(self.data.splits.validation), count)
        known = {
            row.where: (row, text) for file in self.held_out for row, text in self._without(file)
        }
        behind = self._chosen([row for row, _ in known.values()], count)
        rows = [CodeRow(row, False, {"of another file": [self._other(row)]}) for row in plain]
        for row in behind:
            comments = {
                "of another file": [self._other(row)],
                "of the file": [self.thought(row, known[row.where][1])],
            }
            rows.append(CodeRow(row, True, comments))
        return rows

    def thought(self, row: PromptRow, text: str) -> Thought:
        """Return a comment as a thought in front of a line."""
        line = str(row.extra["line"])
        usable = copied_share(text, line, self.guard.run) < self.guard.overlap
        tokens = self.data.code_tokens
        return {"text": text, "ids": list(tokens.piece(f"{text}\n")), "usable": usable}

    def _other(self, row: PromptRow) -> Thought:
        """Return a comment of another file, chosen by a hash of the line."""
        others = [text for name, text in self.texts if name != row.extra["file"]]
        place = int(share_of(f"comment {row.where}", self.seed) * len(others))
        return self.thought(row, others[place])

    def _without(self, file: CodeFile) -> Iterator[tuple[PromptRow, str]]:
        """Yield the lines of a file that stand behind a comment, without it, and the comment."""
        for i in commented(file):
            lines = (*file.lines[: i - 1], *file.lines[i:])
            cut = CodeFile(file.name, lines, (i - 1,))
            for row in self.data.rows_of(cut):
                yield row, file.lines[i - 1].strip()

    def _chosen(self, rows: list[PromptRow], count: int) -> list[PromptRow]:
        return sorted(rows, key=lambda row: share_of(row.where, self.seed))[:count]


def commented(file: CodeFile) -> list[int]:
    """Return the statements that begin behind one comment line of their own indentation.

    The comment has a letter in it, so lines such as `# -----` are left out. Code in comments is not.
    """
    comments = ((i, comment_above(file, i)) for i in file.starts)
    return [i for i, text in comments if text and any(letter.isalpha() for letter in text)]
