"""The target folder of an export, its replacement, and its files beside weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.policies.checkpoints import HEADS, HEADS_CONFIG
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.storage.disk import PART, Disk, beside, discard, locate, put, sync_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from lightning_mpo.policies.loaded import LoadedPolicy

CARD = "README.md"
USAGE = "lightning_mpo.json"
WRITTEN = (
    *(
        "adapter_*",
        "model*.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
    ),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.*",
        "merges.txt",
    ),
    *(HEADS, HEADS_CONFIG, USAGE, "lightning_mpo.yaml", CARD),
)
"""Patterns of the files that exports write. A new export replaces these and nothing else."""


@dataclass(frozen=True)
class Sampling:
    """Options of the sampling in training."""

    temperature: float = 1.0
    max_new_tokens: int = 256
    support: Support | None = None
    sampler: Sampler | None = None
    """Of the run; a masked policy uses its blocks and steps."""
    stop: tuple[int | str, ...] = ()
    """`rollout.stop`: tokens that end a response. Texts are written, ids cannot be."""

    def options(self) -> dict[str, Any]:
        """Return the options of transformers; a support that they cannot express is left out."""
        top_k = 0  # no limit, where the default of transformers is 50
        if isinstance(self.support, TopK) and not self.support.from_reference:
            top_k = self.support.k
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": top_k,
            "top_p": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": [text for text in self.stop if isinstance(text, str)] or None,
        }

    def barred(self, policy: LoadedPolicy) -> list[int] | None:
        """Return the ids that `AllowedTokens` bars, which no step samples; None: there are none."""
        if self.support is None or not self.support.fixed.bars:
            return None
        return list(self.support.fixed.barred(policy.token_texts, policy.end_tokens))

    @property
    def is_complete(self) -> bool:
        """True if `options` and `barred` describe the support completely."""
        if self.support is None:
            return True
        return isinstance(self.support, FullVocabulary) or self.options()["top_k"] > 0


def check_target(folder: Path, overwrite: bool, remedy: str) -> None:
    """Check that an export may replace a folder and can be written beside it; nothing is changed.

    Args:
        folder: the target.
        overwrite: accept a folder that is not empty.
        remedy: instruction that tells a user how to set `overwrite`.

    Raises:
        UserError: it is a file, cannot be written to or replaced, or is not empty without
            `overwrite`.
    """
    try:
        # a folder that cannot be renamed
        target = folder.resolve()
        if target.is_mount() or Path.cwd().is_relative_to(target):
            kind = "mounted" if target.is_mount() else "the working folder"
            raise UserError(
                f"the target folder {str(folder)!r} is {kind} and cannot be replaced; name one "
                "inside it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        # a folder that is in use
        held = sorted(path.name for path in target.iterdir()) if target.exists() else []
        if held and not overwrite:
            raise UserError(
                f"the target folder {str(folder)!r} is not empty (it holds {held[0]!r}); name "
                f"another, or {remedy}"
            )
        # a folder without write permission
        for place in (target.parent, *([target] if target.exists() else [])):
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise UserError(
            f"the target folder {str(folder)!r} cannot be written to: {error.strerror or error}"
        ) from error


def part_of(folder: Path) -> Path:
    """Return the folder of an export until it has been checked, beside its target."""
    return beside(folder.resolve(), PART)


def begin(folder: Path) -> Path:
    """Make the folder of an unchecked export, without leftovers of a killed run."""
    part = part_of(folder)
    discard(part)
    part.mkdir(parents=True)
    return part


def finish(folder: Path) -> None:
    """Replace the target by the checked export; files that no export wrote stay.

    Raises:
        UserError: it could not.
    """
    part, target = part_of(folder), folder.resolve()
    try:
        for path in (*part.rglob("*"), part):
            sync_folder(path)
        _restore(target)
        for path in target.iterdir() if target.is_dir() else ():
            if (
                not any(fnmatch(path.name, pattern) for pattern in WRITTEN)
                and not (part / path.name).exists()
            ):
                _link(path, part / path.name)
        put(Disk(), part, target)
    except OSError as error:
        raise UserError(
            f"the export in {part} could not take the place of {folder}: {error.strerror or error}"
        ) from error


def _restore(target: Path) -> None:
    """Rename a folder back that a killed run had moved aside."""
    if (aside := locate(target)) != target:
        Disk().rename(aside, target)


def _link(source: Path, target: Path) -> None:
    """Link or copy a file or folder, so that one of both exists at any time."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: Any, target: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not on every file system
        shutil.copy2(source, target, follow_symlinks=False)


def write_extras(policy: LoadedPolicy, folder: Path, sampling: Sampling) -> None:
    """Write the tokenizer with its chat template, generation options and multi-token heads."""
    policy.tokenizer.save_pretrained(folder)
    generation_config(policy, sampling).save_pretrained(folder)
    if policy.mtp is None:
        return
    policy.mtp.save(folder / HEADS)
    options = {
        name: getattr(policy.mtp, name)
        for name in ("offsets", "own_unembedding", "detach_trunk", "support")
    }
    described = {
        "class_path": f"lightning_mpo.policies.{type(policy.mtp).__name__}",
        "init_args": options,
        "heads": policy.describe_heads(),
    }
    (folder / HEADS_CONFIG).write_text(json.dumps(described, indent=1) + "\n")


def generation_config(policy: LoadedPolicy, sampling: Sampling) -> GenerationConfig:
    """Return generation options that sample as in training."""
    from transformers import GenerationConfig

    tokenizer, ends = policy.tokenizer, policy.end_tokens
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=sampling.barred(policy),
        **sampling.options(),
    )
