"""Print the oldest versions that pyproject.toml admits, as constraints for pip: python .ci/oldest.py > oldest.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def constraint(requirement: str) -> str:
    """Return the lower bound of a requirement as a version.

    Example:
        >>> constraint("jsonargparse[signatures,omegaconf]>=4.45,<5"), constraint("lightning>=2.6.4,<3")
        ('jsonargparse==4.45.*', 'lightning==2.6.4')
    """
    found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?>=([\d.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no lower bound")
    name, bound = found.groups()
    parts = bound.split(".")
    parts += ["0"] * (2 - len(parts))
    return f"{name}=={'.'.join(parts)}" + (".*" if len(parts) == 2 else "")


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    print("\n".join(constraint(requirement) for requirement in project["dependencies"]))
