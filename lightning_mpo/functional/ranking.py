"""Ranks of tokens among all ids of the vocabulary, without ever holding a ``[B, T, V]`` tensor."""

from torch import Tensor

from lightning_mpo.functional.head_gradients import count_larger, largest
from lightning_mpo.functional.head_logits import Head, RawLogits
from lightning_mpo.functional.head_positions import Positions
from lightning_mpo.functional.heads import FULL_CHUNK_BYTES


def full_ranks(
    hidden_BTD: Tensor,
    head: Head,
    tokens_BT: Tensor,
    *,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Count the ids whose logit is larger than a token's; 0: the token is the most probable id.

    Temperature, a positive scale and a soft cap change no rank. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        head: The unembedding. Its temperature, scale and soft cap are not read. Barred ids have the
            lowest rank.
        tokens_BT: Ids of the tokens, shape ``[B, T]``.
        mask_BT: Positions to rank, shape ``[B, T]``. The others get 0; their ids are not read.

    Returns:
        Ranks, int64, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, or an id to be ranked is not in the vocabulary.

    >>> import torch
    >>> hidden = torch.tensor([[1.0, 0.0]])
    >>> head = Head(torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 5.0]]))
    >>> full_ranks(hidden, head, torch.tensor([0]))
    tensor([2])
    """
    sizes = head.check(hidden_BTD, tokens_BT=tokens_BT, mask_BT=mask_BT)
    chunk = head.tokens_per_chunk(FULL_CHUNK_BYTES, 4 * sizes["V"])
    positions = Positions(tokens_BT.shape, mask_BT)
    ids = positions.gather_ids("tokens_BT", tokens_BT.unsqueeze(-1), sizes["V"])
    raw = RawLogits(*head.raw_inputs(positions.gather(hidden_BTD)))
    return positions.scatter(count_larger(raw, ids, chunk, head.barred_V))


def full_top_k(
    hidden_BTD: Tensor,
    head: Head,
    k: int,
    *,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Pick the k most probable ids of the vocabulary, by logit (highest first), then by id.

        P_t = {v : rank(v | s_t) <= k}                        (RLPT; docs/algorithms.md 2.2)

    Temperature, a positive scale and a soft cap change no rank. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        head: The unembedding. Its temperature, scale and soft cap are not read. Barred ids have the
            lowest rank.
        k: Size of the set, 1 to V.
        mask_BT: Positions to look at, shape ``[B, T]``. The others get ids 0.

    Returns:
        Ids, int32, shape ``[B, T, k]``.

    Raises:
        ValueError: If shapes differ or k is out of range.

    >>> import torch
    >>> hidden = torch.tensor([[1.0, 0.0]])
    >>> head = Head(torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 5.0]]))
    >>> full_top_k(hidden, head, 2)
    tensor([[0, 2]], dtype=torch.int32)
    """
    sizes = head.check(hidden_BTD, mask_BT=mask_BT)
    if not 1 <= k <= sizes["V"]:
        raise ValueError(f"`k` must be between 1 and the vocabulary size {sizes['V']}, got {k}")
    chunk = head.tokens_per_chunk(FULL_CHUNK_BYTES, 4 * sizes["V"])
    positions = Positions(hidden_BTD.shape[:-1], mask_BT)
    raw = RawLogits(*head.raw_inputs(positions.gather(hidden_BTD)))
    return positions.scatter(largest(raw, k, chunk, head.barred_V))
