"""From token log-ratios to action log-ratios: over how many tokens is one importance ratio taken?

A token (GRPO, DAPO), a block of N consecutive tokens (MPO, Multi-token Policy Gradient
Optimization, arXiv:2602.14386), a segment, or the whole sequence (GSPO, arXiv:2507.18071). MPO's
equations were not seen in print; what stands here and its evidence: docs/algorithms.md 3.2 to 3.4.

Every function returns the same three tensors of shape ``[B, T]`` (an action stands at its first
token, U = T): the log-ratios (0 where no action starts), where actions start, and how many tokens
each action stands for. The last sums to the number of response tokens. Nothing is clamped here:
``surrogates.safe_ratio`` clamps the sum.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def block_log_ratios(
    log_ratios: Tensor,
    mask_BT: Tensor,
    weights_N: Tensor,
    *,
    stride: int = 1,
    tail: Literal["absorb", "renorm"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one weighted log-ratio over each block of N consecutive tokens.

        log R_t = Σ_n β_n ℓ_n(t) alive_n(t),   alive_n(t) = mask_t · … · mask_{t+n}
                                                            (MPO Eq. 12 [I]; docs/algorithms.md 3.2)

    With weights that sum to 1, R is a geometric mean of the block's ratios and not their product,
    so it is biased as an importance ratio; with weights of 1 it is the product (MPO Eq. 11 [S]). A
    block ends at the first gap of the mask. At stride 1 blocks slide and overlap; at a larger
    stride they start at every stride-th token of a run of the mask, anew after each gap.

    Where fewer than N tokens are left, ``"absorb"`` takes the missing ratios as 1 (after its end a
    sequence is absorbing under both policies), ``"renorm"`` scales the weights that are left to the
    sum of all weights. The default is to absorb at stride 1, where every interior token then has
    coefficient 1, and to renormalise at a larger stride, where absorbing would train the last
    tokens, often the answer, at a fraction [I]. Absorb if the weights are not meant to sum to 1.

    Args:
        log_ratios: log(π / π_old), nats: ``[B, T]``, the backbone's, shifted here along T; or ``[B,
            T, N]``, where column n at t is the log-ratio of the token t+n as predicted at t
            (multi-token heads). Never read outside the mask.
        mask_BT: Response tokens that count, shape ``[B, T]``.
        weights_N: β by offset, shape ``[N]``; the first is the current token's.
        stride: Tokens from one block to the next, 1 (sliding) to N (disjoint).
        tail: What happens to a block that is cut short; None chooses by stride.

    Returns:
        Log-ratios of the blocks, where blocks start (bool), and tokens per block, each of shape
        ``[B, T]``.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> log_ratios, mask = torch.tensor([[0.1, 0.2, 0.4]]), torch.tensor([[True, True, True]])
    >>> block_log_ratios(log_ratios, mask, torch.tensor([0.5, 0.5]))[0]
    tensor([[0.1500, 0.3000, 0.2000]])
    >>> block_log_ratios(log_ratios, mask, torch.tensor([0.5, 0.5]), stride=2)
    (tensor([[0.1500, 0.0000, 0.4000]]), tensor([[ True, False,  True]]), tensor([[2., 0., 1.]]))
    """
    length = check(weights_N=weights_N, mask_BT=mask_BT)["N"]
    if not 1 <= stride <= length:
        raise ValueError(f"`stride` must be between 1 and the block length {length}, got {stride}")
    if tail not in (None, "absorb", "renorm"):
        raise ValueError(f"`tail` must be 'absorb', 'renorm' or None, got {tail!r}")
    columns = _columns(log_ratios, mask_BT, length)
    weights = weights_N.to(log_ratios)
    alive = torch.stack([shift_left(mask_BT, n) for n in range(length)], -1).cumprod(-1).bool()
    blocks = (torch.where(alive, columns, 0) * weights).sum(-1)
    if tail == "renorm" or (tail is None and stride > 1):
        left = (alive * weights).sum(-1)
        blocks = blocks * torch.where(left > 0, weights.sum() / left, 0)
    starts, tokens = _cut(mask_BT, stride)
    return torch.where(starts, blocks, 0), starts, tokens.to(log_ratios)


def sequence_log_ratios(
    log_ratios_BT: Tensor, mask_BT: Tensor, *, mean: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one log-ratio over the whole response.

        log s = (1/|o|) Σ_t ℓ_t    (mean: GSPO [C, TRL and verl]; docs/algorithms.md 3.6)
        log s = Σ_t ℓ_t            (the true sequence ratio)

    Args:
        log_ratios_BT: log(π / π_old) of the tokens, shape ``[B, T]``, nats. Never read outside the
            mask.
        mask_BT: Response tokens that count, shape ``[B, T]``; gaps are skipped, they do not end the
            sequence.
        mean: Divide by the number of tokens.

    Returns:
        Log-ratios, where actions start (the first token of the mask; bool), and tokens per action,
        each of shape ``[B, T]``.

    Raises:
        ValueError: If the shapes differ.

    >>> log_ratios, mask = torch.tensor([[9.0, 0.2, 0.4]]), torch.tensor([[False, True, True]])
    >>> sequence_log_ratios(log_ratios, mask)
    (tensor([[0.0000, 0.3000, 0.0000]]), tensor([[False,  True, False]]), tensor([[0., 2., 0.]]))
    """
    check(log_ratios_BT=log_ratios_BT, mask_BT=mask_BT)
    return segment_log_ratios(
        log_ratios_BT, mask_BT, torch.zeros_like(mask_BT, dtype=torch.int64), mean=mean
    )


def sequence_token_log_ratios(
    log_ratios_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give every token the log-ratio of its response, with the gradient of its own.

        log s_t = sg(log s) + ℓ_t - sg(ℓ_t),     log s = (1/|o|) Σ_t ℓ_t
                                                      (GSPO-token [C, verl]; docs/algorithms.md 3.6)

    Args:
        log_ratios_BT: log(π / π_old) of the tokens, shape ``[B, T]``, nats. Never read outside the
            mask.
        mask_BT: Response tokens that count, shape ``[B, T]``.

    Returns:
        Log-ratios, where actions start (the mask itself), and tokens per action (1), each of shape
        ``[B, T]``.

    Raises:
        ValueError: If the shapes differ.

    >>> log_ratios, mask = torch.tensor([[9.0, 0.2, 0.4]]), torch.tensor([[False, True, True]])
    >>> sequence_token_log_ratios(log_ratios, mask)
    (tensor([[0.0000, 0.3000, 0.3000]]), tensor([[False,  True,  True]]), tensor([[0., 1., 1.]]))
    """
    check(log_ratios_BT=log_ratios_BT, mask_BT=mask_BT)
    masked_BT = log_ratios_BT.masked_fill(~mask_BT, 0)
    mean = (masked_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)).detach()
    return (
        torch.where(mask_BT, mean + masked_BT - masked_BT.detach(), 0),
        mask_BT,
        mask_BT.to(masked_BT),
    )


def segment_log_ratios(
    log_ratios_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor, *, mean: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one log-ratio over each segment.

        log s_j = (1/n_j) Σ_{t in segment j} ℓ_t    (mean)     or     Σ_{t in segment j} ℓ_t

    Tokens of a row with the same id are one segment, also across a gap of the mask; tokens outside
    the mask belong to none.

    Args:
        log_ratios_BT: log(π / π_old) of the tokens, shape ``[B, T]``, nats. Never read outside the
            mask.
        mask_BT: Response tokens that count, shape ``[B, T]``.
        segments_BT: Id of each token's segment, shape ``[B, T]``, in [0, T) where the mask is True.
        mean: Divide by the number of tokens of the segment.

    Returns:
        Log-ratios, where segments start (bool), and tokens per segment, each of shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ or an id is out of range.

    >>> log_ratios, mask = torch.tensor([[0.1, 0.3, 0.5]]), torch.tensor([[True, True, True]])
    >>> segment_log_ratios(log_ratios, mask, torch.tensor([[0, 0, 1]]))
    (tensor([[0.2000, 0.0000, 0.5000]]), tensor([[ True, False,  True]]), tensor([[2., 0., 1.]]))
    """
    sizes = check(log_ratios_BT=log_ratios_BT, mask_BT=mask_BT, segments_BT=segments_BT)
    segments = segments_BT.long().masked_fill(~mask_BT, 0)
    if ((segments < 0) | (segments >= sizes["T"])).any():
        worst = int(segments.min() if (segments < 0).any() else segments.max())
        raise ValueError(
            f"`segments_BT` must be in [0, {sizes['T']}) where `mask_BT` is True, got {worst}"
        )
    zeros = torch.zeros_like(log_ratios_BT)
    sums = zeros.scatter_add(1, segments, log_ratios_BT.masked_fill(~mask_BT, 0)).gather(
        1, segments
    )
    tokens = zeros.scatter_add(1, segments, mask_BT.to(zeros)).gather(1, segments)
    here = torch.arange(sizes["T"], device=mask_BT.device).expand_as(segments)
    last = torch.full_like(segments, sizes["T"])
    firsts = last.scatter_reduce(1, segments, torch.where(mask_BT, here, last), "amin").gather(
        1, segments
    )
    starts = mask_BT & (firsts == here)
    values = sums / tokens.clamp(min=1) if mean else sums
    return torch.where(starts, values, 0), starts, torch.where(starts, tokens, 0)


def window(mask_BT: Tensor, n: int) -> Tensor:
    """Tell where a token and the n tokens behind it all count.

        alive_n(t) = mask_t · mask_{t+1} · … · mask_{t+n}
                                           (windows stop at masked gaps [I]; docs/algorithms.md 3.4)

    Args:
        mask_BT: Tokens that count, shape ``[B, T]``.
        n: Offset; 0 returns the mask.

    Returns:
        Bool, shape ``[B, T]``.

    >>> window(torch.tensor([[True, True, False, True]]), 1)
    tensor([[ True, False, False, False]])
    """
    alive = mask_BT
    for i in range(1, n + 1):
        alive = alive & shift_left(mask_BT, i)
    return alive


def shift_left(values_BT: Tensor, n: int) -> Tensor:
    """Move what stands at t+n to t; the last n columns get 0 (False).

    Args:
        values_BT: Any tensor whose second dimension is T.
        n: Columns, not negative.

    Returns:
        The same shape and dtype.

    >>> shift_left(torch.tensor([[1, 2, 3]]), 1)
    tensor([[2, 3, 0]])
    """
    moved = torch.zeros_like(values_BT)
    T = values_BT.shape[1]
    moved[:, : max(T - n, 0)] = values_BT[:, n:]
    return moved


def _columns(log_ratios: Tensor, mask_BT: Tensor, length: int) -> Tensor:
    """Return the log-ratios as [B, T, N]: shifted copies of the backbone's, or the heads' as they
    are.
    """
    if log_ratios.ndim == 2:
        check(mask_BT=mask_BT, log_ratios_BT=log_ratios)
        return torch.stack([shift_left(log_ratios, n) for n in range(length)], -1)
    check({"N": length}, mask_BT=mask_BT, log_ratios_BTN=log_ratios)
    return log_ratios


def _cut(mask_BT: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Cut each run of the mask into pieces of ``stride`` tokens; return where they start and how
    long they are.
    """
    width = mask_BT.shape[1]
    here = torch.arange(width, device=mask_BT.device).expand_as(mask_BT)
    gap_before = torch.where(mask_BT, -1, here).cummax(1).values
    gap_after = torch.where(mask_BT, width, here).flip(1).cummin(1).values.flip(1)
    starts = mask_BT & ((here - gap_before - 1) % stride == 0)
    return starts, torch.where(starts, (gap_after - here).clamp(max=stride), 0)
