"""Where tokens stand among all ids of the vocabulary, without ever holding a ``[B, T, V]`` tensor."""

from torch import Tensor

from lightning_mpo.functional.head_gradients import RawLogits, count_larger, largest
from lightning_mpo.functional.head_positions import (
    FULL_CHUNK_BYTES,
    Positions,
    adapter_parts,
    raw_inputs,
    tokens_per_chunk,
)
from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.shapes import check


def full_ranks(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    *,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Count the ids whose logit is larger than a token's: 0 means that it is the most probable one.

    Temperature, a positive scale and a soft cap change no rank, so they are not asked for. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        tokens_BT: Ids of the tokens, shape ``[B, T]``.
        mask_BT: Positions to rank, shape ``[B, T]``. The others get 0; their ids are not read.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits.

    Returns:
        Ranks, int64, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, or an id to be ranked is not in the vocabulary.

    >>> import torch
    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 5.0]])
    >>> full_ranks(hidden, weight, torch.tensor([0]))
    tensor([2])
    """
    sizes = check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        bias_V=bias_V,
        **adapter_parts(adapter),
    )
    chunk = tokens_per_chunk(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    positions = Positions(tokens_BT.shape, mask_BT)
    ids = positions.gather_ids("tokens_BT", tokens_BT.unsqueeze(-1), sizes["V"])
    raw = RawLogits(*raw_inputs(positions.gather(hidden_BTD), weight_VD, bias_V, adapter))
    return positions.scatter(count_larger(raw, ids, chunk))


def full_top_k(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Pick the k most probable ids of the whole vocabulary, by logit (highest first), then by id (lowest first).

        P_t = {v : rank(v | s_t) <= k}                        (RLPT; docs/algorithms.md 2.2)

    Temperature, a positive scale and a soft cap change no rank, so they are not asked for. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        k: Size of the set, 1 to V.
        mask_BT: Positions to look at, shape ``[B, T]``. The others get ids 0.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits.

    Returns:
        Ids, int32, shape ``[B, T, k]``.

    Raises:
        ValueError: If shapes differ or k is out of range.

    >>> import torch
    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 5.0]])
    >>> full_top_k(hidden, weight, 2)
    tensor([[0, 2]], dtype=torch.int32)
    """
    sizes = check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        mask_BT=mask_BT,
        bias_V=bias_V,
        **adapter_parts(adapter),
    )
    if not 1 <= k <= sizes["V"]:
        raise ValueError(f"`k` must be between 1 and the vocabulary size {sizes['V']}, got {k}")
    chunk = tokens_per_chunk(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    positions = Positions(hidden_BTD.shape[:-1], mask_BT)
    raw = RawLogits(*raw_inputs(positions.gather(hidden_BTD), weight_VD, bias_V, adapter))
    return positions.scatter(largest(raw, k, chunk))
