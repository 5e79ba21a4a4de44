"""Reads policies from Lightning checkpoints and from folders of adapters as peft writes them.

Nothing that a file names is ever run: checkpoints are read as data (`storage`), adapters and heads
as safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.storage import Part, is_shards, locate, read_checkpoint, unfinished_mark

if TYPE_CHECKING:
    from torch import nn

    from lightning_mpo.policies.lora import Lora

PREFIX = "policy."
"""Prefix of a policy's names in a module's state dict."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias"), ()),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"), ()),
    **dict.fromkeys(
        ("target_parameters", "trainable_token_indices", "alora_invocation_tokens"), ()
    ),
    **dict.fromkeys(("arrow_config", "ensure_weight_tying"), ()),
}
"""Entries of peft's description that change what adapters compute, with their plain values.

Empty values are plain, too.
"""
HEADS, HEADS_CONFIG = "mtp_heads.safetensors", "mtp_heads.json"


def read_policy(
    checkpoint: str, part: Part = "weights", option: str = "policy.checkpoint"
) -> dict[str, Any]:
    """Return a checkpoint's policy.

    Args:
        checkpoint: a Lightning checkpoint, a file or a folder, or a folder of adapters.
        part: "outline" leaves the tensors on the disk.
        option: names the checkpoint, for messages.

    Returns:
        `state_dict` with the policy's own names; `mtp`, which describes its heads; `adapters`,
        peft's description of them, which only folders have.

    Raises:
        UserError: there is no such file, it is damaged or no Lightning checkpoint, or reading it
            would run code.
    """
    path = locate(checkpoint)
    if path.is_dir() and not is_shards(path):
        return _read_adapters(path, option)
    if part == "weights" and unfinished_mark(checkpoint).exists():
        rank_zero_warn(
            f"`{option}` {checkpoint!r} is of a stage that was stopped before its end: "
            "`fit` of the run that names it as its `warmup` goes on with it first"
        )
    content = read_checkpoint(checkpoint, f"`{option}`", part)
    state = {
        key.removeprefix(PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(PREFIX)
    }
    return {"state_dict": state, "mtp": content.get("mtp"), "adapters": None}


def _read_adapters(folder: Path, option: str) -> dict[str, Any]:
    shown = f"`{option}` {str(folder)!r}"
    if not (folder / ADAPTER).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        hint = (
            "; it is a whole model: name it as `policy.source`"
            if (folder / "config.json").is_file()
            else ""
        )
        raise UserError(f"{shown} is a folder without {ADAPTER} and {ADAPTER_CONFIG}{hint}")
    adapters = _read_json(folder / ADAPTER_CONFIG, shown)
    tensors = read_safetensors(folder / ADAPTER, shown)
    state = {_policy_name(key): value for key, value in tensors.items()}
    mtp = None
    if (folder / HEADS).is_file():
        mtp = _read_json(folder / HEADS_CONFIG, shown).get("heads")
        state |= {
            f"mtp.{key}": value for key, value in read_safetensors(folder / HEADS, shown).items()
        }
    return {"state_dict": state, "mtp": mtp, "adapters": adapters}


def _policy_name(key: str) -> str:
    """Return the policy's name of a tensor that peft has saved."""
    key = key.replace("base_model.model.", "network.", 1)
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", key)


def read_safetensors(path: Path, shown: str) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        UserError: it is missing or damaged; the message begins with `shown`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shown}: {path.name} cannot be read as safetensors: {error}") from error


def _read_json(path: Path, shown: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown}: {path.name} must hold an object, got {type(content).__name__}")
    return content


def load_state(
    policy: nn.Module, state: dict[str, Tensor], required: Collection[str], shown: str
) -> None:
    """Load a checkpoint's tensors into a policy, after a check that they fit.

    Args:
        policy: with its modules in place.
        state: tensors by the policy's names.
        required: names that must be in `state`.
        shown: option and value that name the checkpoint, for messages.

    Raises:
        UserError: a shape or a kind of number differs, or a name is missing or unknown.
    """
    misfit = f"{shown} does not fit the policy: "
    # shapes
    present = policy.state_dict()
    common = [key for key in state if key in present]
    for key in common:
        if present[key].shape != state[key].shape:
            raise UserError(
                f"{misfit}{key!r} has shape {list(state[key].shape)}, the policy needs "
                f"{list(present[key].shape)}"
            )
    # whole numbers in place of floats
    for key in common:
        if present[key].is_floating_point() > state[key].is_floating_point():
            raise UserError(
                f"{misfit}{key!r} is of {state[key].dtype}, the policy's of {present[key].dtype}"
            )
    # names
    missing, unknown = policy.load_state_dict(state, strict=False)
    missing = [key for key in missing if key in required]
    if missing or unknown:
        raise UserError(
            f"{misfit}{len(missing)} weights are missing, {len(unknown)} unknown "
            f"(such as {[*missing, *unknown][0]!r})"
        )


def load_network(network: nn.Module, checkpoint: str, option: str, *, adapters: bool) -> None:
    """Load the network of a checkpoint's policy, without heads and critic, into another network.

    Args:
        network: with its modules in place.
        checkpoint: as for `read_policy`.
        option: names the checkpoint, for messages.
        adapters: only its adapters must be there.

    Raises:
        UserError: as for `read_policy` and `load_state`.
    """
    content, prefix = read_policy(checkpoint, option=option)["state_dict"], "network."
    state = {
        key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)
    }
    names = [name for name, _ in network.named_parameters()]
    required = [name for name in names if "lora_" in name] if adapters else names
    load_state(network, state, required, f"`{option}` {checkpoint!r}")


def check_checkpoint(checkpoint: str, lora: Lora | None, option: str) -> dict[str, Any]:
    """Read a checkpoint without its tensors, refuse one with other adapters, and return the rest.

    Args:
        checkpoint: as for `read_policy`.
        lora: the policy's adapters.
        option: names the checkpoint, for messages.

    Raises:
        UserError: as for `read_policy` and `check_adapters`.
    """
    content = read_policy(checkpoint, "outline", option)
    check_adapters(content, lora, f"`{option}` {checkpoint!r}")
    return content


def check_adapters(content: dict[str, Any], lora: Lora | None, where: str) -> None:
    """Refuse a checkpoint whose adapters are not those of the policy.

    Args:
        content: result of `read_policy`.
        lora: the policy's adapters.
        where: option and value that name the checkpoint, for messages.

    Raises:
        UserError: adapters on one side only, or of another rank or scale.
    """
    # adapters on one side only
    ranks = {
        value.shape[0]
        for key, value in content["state_dict"].items()
        if "lora_A" in key and value.ndim == 2
    }
    if lora is None and ranks:
        raise UserError(
            f"{where} holds adapters of rank {max(ranks)} and the policy has none: give "
            "`policy.lora`"
        )
    weights = any(key.startswith("network.") for key in content["state_dict"])
    if lora is not None and weights and not ranks:
        raise UserError(
            f"{where} holds whole weights and no adapters: leave out `policy.lora`, or export it "
            "(lightning-mpo export) and name that folder as `policy.source`"
        )
    if lora is None:
        return
    # variants of LoRA that compute something else
    described = content["adapters"] or {}
    for name, plain in PLAIN.items():
        if described.get(name) not in plain and described.get(name):
            raise UserError(
                f"{where} holds adapters with `{name}: {described[name]!r}` ({ADAPTER_CONFIG}), "
                "and `policy.lora` makes plain ones, which would compute something else: merge "
                "them into their base with peft (`merge_and_unload`), and name that folder as "
                "`policy.source`"
            )
    # rank and scale
    sizes = {
        "rank": next(iter(ranks - {lora.rank}), lora.rank),
        "alpha": described.get("lora_alpha", lora.alpha),
    }
    for name, value in sizes.items():
        if value != getattr(lora, name):
            raise UserError(
                f"{where} holds adapters of {name} {value}, `policy.lora` has {getattr(lora, name)}"
            )
