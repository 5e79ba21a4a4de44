"""The recipes of the repository, and files that a test writes."""

from __future__ import annotations

from pathlib import Path

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))


def key_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def write(path: str, content: object) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(content))
    return Path(path)


def content(arguments: list[str]) -> list[object]:
    """Return what an expanded command line reads, in order, without `include` and `warmup`, and its other options."""
    read = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "-c":
            loaded = yaml.safe_load(Path(argument).read_text())
            read.append(
                {key: value for key, value in loaded.items() if key not in ("include", "warmup")}
            )
        elif argument != "-c":
            read.append(argument if not argument.startswith("--warmup=") else "--warmup")
    return read
