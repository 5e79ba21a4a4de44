"""Policies in Lightning checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_mpo.errors import UserError

PREFIX = "policy."
"""What a module's state dict puts in front of a policy's names."""


def read_policy(checkpoint: str, mmap: bool = False) -> dict[str, Any]:
    """Return a checkpoint's policy: `state_dict` with the policy's own names, and `mtp`, which describes its heads.

    Args:
        checkpoint: the file.
        mmap: leave the tensors on disk.

    Raises:
        UserError: there is no such file, or it is no Lightning checkpoint.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"`policy.checkpoint` {str(path)!r} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        state = dict(content["state_dict"])
    except Exception as error:
        raise UserError(
            f"`policy.checkpoint` {str(path)!r} cannot be read as a Lightning checkpoint: {type(error).__name__}"
        ) from error
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return {"state_dict": own, "mtp": content.get("mtp")}
