"""Checks that name the argument.

The capital letters after the last underscore of an argument's name are its shape: ``advantages_BU``
has two dimensions, and ``B`` is the same size wherever it occurs in one call. Names that say
``mask`` or ``valid`` are bool; ``tokens``, ``support``, ``segments``, ``candidates`` and ``group``
are integer; every other tensor is floating point.
"""

import re

import torch
from torch import Tensor

_INTEGER = re.compile(r"(tokens|support|segments|candidates|group)_[A-Z]+")


def check(
    letters: dict[str, int] | None = None, *, batch: str = "", **tensors: Tensor | None
) -> dict[str, int]:
    """Check tensors against the shapes and dtypes that their names promise.

    Args:
        letters: Sizes that are known beforehand, by letter.
        batch: Letters at the head of a suffix that stand for any leading shape, the same in all
            tensors: with ``"BT"``, ``hidden_BTD`` may be ``[N, D]`` if ``tokens_BT`` is ``[N]``.
        **tensors: Tensors by argument name; None is skipped.

    Returns:
        The size of every letter.

    Raises:
        TypeError: If an argument is no tensor or has the wrong kind of dtype.
        ValueError: If a shape differs from its name or from another argument.

    >>> check(log_ratios_BU=torch.zeros(2, 3), mask_BU=torch.ones(2, 3, dtype=torch.bool))
    {'B': 2, 'U': 3}
    >>> check(log_ratios_BU=torch.zeros(2, 3), advantages_BU=torch.zeros(2, 4))
    Traceback (most recent call last):
    ValueError: `advantages_BU` must have shape [B=2, U=3] (as `log_ratios_BU`), got [2, 4]
    """
    sizes, origin = dict(letters or {}), ""
    lead: tuple[int, ...] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_dtype(name, tensor)
        dims, shape = name.rsplit("_", 1)[-1], tuple(tensor.shape)
        if batch and dims.startswith(batch):
            dims = dims[len(batch) :]
            cut = max(tensor.ndim - len(dims), 0)
            head, shape = shape[:cut], shape[cut:]
            lead = head if lead is None else lead
            if head != lead or len(shape) != len(dims):
                raise ValueError(_message(name, dims, sizes, origin, tensor, lead))
        if len(shape) != len(dims) or any(
            sizes.get(d, n) != n for d, n in zip(dims, shape, strict=True)
        ):
            raise ValueError(
                _message(
                    name, dims, sizes, origin, tensor, () if len(dims) == tensor.ndim else lead
                )
            )
        sizes.update(zip(dims, shape, strict=True))
        origin = origin or name
    return sizes


def same(**tensors: Tensor) -> None:
    """Check that floating-point tensors, by name, have one shape.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If the shapes differ.

    >>> same(logprobs=torch.zeros(2, 3), reference_logprobs=torch.zeros(3))
    Traceback (most recent call last):
    ValueError: `reference_logprobs` must have the shape of `logprobs`, [2, 3], got [3]
    """
    (first, model), *others = tensors.items()
    _check_dtype(first, model)
    for name, tensor in others:
        _check_dtype(name, tensor)
        if tensor.shape != model.shape:
            shape = f"the shape of `{first}`, {list(model.shape)}"
            raise ValueError(f"`{name}` must have {shape}, got {list(tensor.shape)}")


def check_groups(rows: int, group_size: int) -> None:
    """Refuse rows that are no whole groups, and groups of one.

    Raises:
        ValueError: If `group_size` is below 2, or does not divide the number of rewards.
    """
    if group_size < 2:
        raise ValueError(
            "`group_size` must be at least 2 (a completion is compared with others), got "
            f"{group_size}"
        )
    if rows % group_size:
        raise ValueError(
            f"`rewards_B` must hold whole groups of `group_size` = {group_size}, got {rows} rewards"
        )


def _check_dtype(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
    if "mask" in name or name.startswith("valid"):
        good, kind = tensor.dtype == torch.bool, "bool"
    elif _INTEGER.fullmatch(name):
        good, kind = tensor.dtype in (torch.int32, torch.int64), "int32 or int64"
    else:
        good, kind = tensor.is_floating_point(), "floating point"
    if not good:
        raise TypeError(f"`{name}` must be {kind}, got {tensor.dtype}")


def _message(
    name: str,
    dims: str,
    sizes: dict[str, int],
    origin: str,
    tensor: Tensor,
    lead: tuple[int, ...] | None,
) -> str:
    sizes_by_name = [str(n) for n in lead or ()] + [
        f"{d}={sizes[d]}" if d in sizes else d for d in dims
    ]
    source = f" (as `{origin}`)" if origin else ""
    shape = ", ".join(sizes_by_name)
    return f"`{name}` must have shape [{shape}]{source}, got {list(tensor.shape)}"
