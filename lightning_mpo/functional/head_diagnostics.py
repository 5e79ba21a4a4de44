"""Diagnostics of multi-token heads: calibration, KL divergence, and the gradient that they send into the trunk.

No result carries a gradient (docs/algorithms.md 15.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check

BINS = 10
"""Bins of equal width over the confidences, from 0 to 1."""


@torch.no_grad()
def calibration_sums(confidence_BT: Tensor, hit_mask_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Count predictions, and sum their confidences and hits, in bins of the confidence.

    The sums of several batches can be added before :func:`expected_calibration_error`.

    Args:
        confidence_BT: Probability of the most probable id, in [0, 1], shape ``[B, T]``.
        hit_mask_BT: True where this id is the sampled one, bool, shape ``[B, T]``.
        mask_BT: Positions that count, bool, shape ``[B, T]``.

    Returns:
        Number of predictions, sum of confidences and number of hits of each bin, float64, shape
        ``[BINS, 3]``.

    Raises:
        ValueError: If the shapes differ.

    >>> sums = calibration_sums(torch.tensor([[0.75, 0.75]]), *torch.tensor([[[True, False]], [[True, True]]]))
    >>> sums[7].tolist(), sums.sum().item()
    ([2.0, 1.5, 1.0], 4.5)
    """
    check(confidence_BT=confidence_BT, hit_mask_BT=hit_mask_BT, mask_BT=mask_BT)
    confidence_n = confidence_BT[mask_BT].double()
    rows_n3 = torch.stack(
        [torch.ones_like(confidence_n), confidence_n, hit_mask_BT[mask_BT].double()], -1
    )
    bins_n = (confidence_n * BINS).long().clamp(0, BINS - 1)
    return rows_n3.new_zeros(BINS, 3).index_add_(0, bins_n, rows_n3)


def expected_calibration_error(sums: Tensor) -> Tensor:
    """Return the expected calibration error: the mean distance between confidence and accuracy.

        ECE = Σ_k (n_k / N) · |accuracy_k - confidence_k|             over bins k      (Naeini et al. 2015 [REC])

    With few tokens the estimate is too large: each bin adds the absolute value of its sampling noise.

    Args:
        sums: From :func:`calibration_sums`, added over all batches, shape ``[BINS, 3]``.

    Returns:
        A scalar in [0, 1], shape ``[]``; NaN without a prediction.

    >>> sums = torch.zeros(10, 3)
    >>> sums[7] = torch.tensor([4.0, 3.0, 1.0])
    >>> expected_calibration_error(sums)
    tensor(0.5000)
    """
    number, confidence, hits = sums.unbind(-1)
    return (hits - confidence).abs().sum() / number.sum()


@torch.no_grad()
def excess_entropy(logprobs_BJV: Tensor, mask_BJ: Tensor, head_logprobs_BV: Tensor) -> Tensor:
    """Estimate KL(p‖q), the divergence of a head q from the true distribution p of the token that it predicts.

        p = E_j[p_j]        over continuations j of a state; p_j: the exact softmax at the end of each (Rao-Blackwell)
        KL(p‖q) = -Σ_v p(v) log q(v) - H(p)                            cross-entropy less entropy

    The estimate of the cross-entropy is unbiased. The entropy of the mean of J distributions is too small, by
    E[KL(mean‖p)], which is of order 1/J. The jackknife removes this order:

        Ĥ = J·H(mean) - (J - 1)·mean_j H(mean without j)

    A bias of order 1/J² remains. Its sign may be either, so that an estimate may be below 0. With one p_j, as for a head
    that reads the tokens in between, KL(p_j‖q) is exact.

    Args:
        logprobs_BJV: log p_j of J continuations of B states, nats, -inf allowed, shape ``[B, J, V]``.
        mask_BJ: Continuations that count, bool, shape ``[B, J]``; at least one in each state.
        head_logprobs_BV: log q, nats, -inf only where all p_j are 0, shape ``[B, V]``.

    Returns:
        Estimates in nats, shape ``[B]``.

    Raises:
        ValueError: If the shapes differ.

    >>> halves = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    >>> excess_entropy(halves, torch.tensor([[True, True]]), torch.tensor([[0.5, 0.5]]).log())
    tensor([0.])
    """
    check(logprobs_BJV=logprobs_BJV, mask_BJ=mask_BJ, head_logprobs_BV=head_logprobs_BV)
    # the mean over continuations, and its cross-entropy
    number_B = mask_BJ.sum(1)
    p_BJV = torch.where(mask_BJ[..., None], logprobs_BJV.exp(), 0)
    sum_BV = p_BJV.sum(1)
    mean_BV = sum_BV / number_B[:, None]
    cross_B = -torch.where(mean_BV > 0, mean_BV * head_logprobs_BV, 0).sum(-1)
    # its entropy, with every continuation and with each one left out
    others_B1 = (number_B[:, None] - 1).clamp(min=1)
    without_BJV = (sum_BV[:, None] - p_BJV).clamp(min=0) / others_B1[..., None]
    entropy_B, without_BJ = _entropy(mean_BV), _entropy(without_BJV)
    left_out_B = torch.where(mask_BJ, without_BJ, 0).sum(1) / number_B
    jackknife_B = number_B * entropy_B - (number_B - 1) * left_out_B
    return cross_B - torch.where(number_B > 1, jackknife_B, entropy_B)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


@torch.no_grad()
def gradient_parts(
    first: Sequence[Tensor | None],
    later: Sequence[Tensor | None],
    cross_entropy: Sequence[Tensor | None],
) -> Tensor:
    """Measure the gradient of the later tokens of blocks, and its part along the heads' cross-entropy.

    Both are divided by the norm of the gradient of the first tokens.

        future   = |g_F| / |g_0|
        spurious = |<g_F, g_CE>| / (|g_CE|·|g_0|)                     (the part of g_F along g_CE) / |g_0|       [I]

    Args:
        first: g_0, gradients of the weights from offset 0, a tensor of any shape for each weight; None: no gradient.
        later: g_F, gradients of the same weights from offsets n ≥ 1.
        cross_entropy: g_CE, gradients of the same weights from the heads' cross-entropy.

    Returns:
        `future` and `spurious`, without unit, float64, shape ``[2]``; NaN if g_0 is 0. `spurious` is 0 if g_CE is 0.

    Raises:
        ValueError: If the numbers of weights differ.

    >>> one = torch.tensor([2.0, 0.0])
    >>> gradient_parts([one], [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 0.1])])
    tensor([2.5000, 2.0000], dtype=torch.float64)
    """
    size = _dot(first, first).sqrt()
    along, length = _dot(later, cross_entropy).abs(), _dot(cross_entropy, cross_entropy).sqrt()
    spurious = torch.where(length > 0, along / length, 0)
    return torch.stack([_dot(later, later).sqrt(), spurious]) / size.masked_fill(
        size == 0, torch.nan
    )


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    products = [
        (a * b).sum(dtype=torch.float64)
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
