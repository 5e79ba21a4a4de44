"""The base of data modules on Python files: their options, and which files are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.checks import at_least, seeds, within
from lightning_mpo.data.annotations import AnnotatedFile
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.code_files import CodeFile, describe_skipped, share_of
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

F = TypeVar("F", CodeFile, AnnotatedFile)


class CodePrompts(PromptDataModule):
    """Prompts from Python files: code without a template or a text around it, cut to its end.

    Files that do not parse, are indented by tabs or cannot be read are left out; their number is
    printed. Whether a file is held out depends on a hash of its text, without thoughts.

    Args:
        paths: folders, patterns such as `src/**/*.py`, or `stdlib`, the standard library of the
            interpreter that runs.
        max_files: most files, chosen by a hash of their names; None: all.
        validation_share: part of the files that is held out.
        split_seed: seed of the choice of held-out files, and of rows within files.
        max_prompt_tokens: longest prompt.
        validation_prompts: number of rows that `validate` takes, the first ones; None: all.
        kwargs: `seed` and `validation_batch_size`, as for `PromptDataModule`.

    Raises:
        UserError: an option is out of range.
    """

    searches_ngrams = False

    def __init__(
        self,
        paths: list[str],
        max_files: int | None = None,
        validation_share: float = 0.1,
        split_seed: int = 0,
        max_prompt_tokens: int = 256,
        validation_prompts: int | None = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            chat_template=False,
            instruction="",
            max_prompt_tokens=max_prompt_tokens,
            validation_prompts=validation_prompts,
            system=None,
            suffix="",
            template_arguments=None,
            control_tokens=False,
            overlong="cut",
            order="shuffled",
            curriculum=None,
            **kwargs,
        )
        name = type(self).__name__
        if not paths or isinstance(paths, str):
            raise UserError(f"`{name}.paths` must be a list of folders or patterns, got {paths!r}")
        at_least(name, 1, max_files=max_files)
        within(name, "[0, 1)", validation_share=validation_share)
        seeds(name, split_seed=split_seed)
        self.paths, self.max_files = list(paths), max_files
        self.validation_share, self.split_seed = validation_share, split_seed

    def holds_out(self, file: CodeFile | AnnotatedFile) -> bool:
        """Return whether a hash of its text puts a file on the held-out side."""
        return share_of(file.text, self.split_seed) < self.validation_share

    def _split(
        self,
        files: Sequence[F],
        skipped: Counter[str],
        rows_of: Callable[[F], Iterable[PromptRow]],
        absence: str = "no line",
        note: str = "",
    ) -> Splits:
        """Return the rows of files to train and to validate on, and print the number of files.

        Args:
            files: usable files.
            skipped: number of other files, by reason.
            rows_of: returns the rows of a file.
            absence: words for an empty side in a message.
            note: further numbers to print.

        Raises:
            UserError: a side is empty.
        """
        train: list[PromptRow] = []
        validation: list[PromptRow] = []
        held_out = 0
        for file in files:
            is_held_out = self.holds_out(file)
            held_out += is_held_out
            (validation if is_held_out else train).extend(rows_of(file))
        rank_zero_info(
            f"data       {type(self).__name__}: {len(files):,} files, {held_out:,} of them held "
            f"out; {note}skipped: {describe_skipped(skipped)}"
        )
        splits = Splits(train, validation)
        self._refuse_empty(
            splits,
            f"{len(files)} files and {absence}",
            "; give more files, or change `validation_share` or `split_seed`",
        )
        return splits

    def _refuse_empty(self, splits: Splits, absence: str, remedy: str) -> None:
        """Refuse rows of which a side is empty; nothing to validate on is right for a share of 0.

        Args:
            splits: the rows.
            absence: words for an empty side.
            remedy: end of the message.

        Raises:
            UserError: a side is empty.
        """
        if not splits.train or (not splits.validation and self.validation_share):
            part = "validate" if splits.train else "train"
            raise UserError(f"`{type(self).__name__}` has {absence} to {part} on{remedy}")
