"""Products of token ratios along a response: of the prefix (CTPO), and of the next tokens (NFPO).

The product over the prefix corrects the distribution of states. The product over the next tokens
corrects the return that follows a token (docs/algorithms.md 3.8).
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.surrogates import safe_ratio


def prefix_log_ratios(
    log_ratios_BT: Tensor, mask_BT: Tensor, *, mean: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each token the log-ratio of its prefix, with the gradient of the token alone.

        log R_t = sg(S_t) + ℓ_t - sg(ℓ_t),   S_t = Σ_{j <= t} ℓ_j       (mean: S_t / t)
                                        (CTPO, arXiv:2605.07331 [P, abstract; C, the authors' code])

    The prefix includes the token itself.

    Args:
        log_ratios_BT: log(π / π_old) of the tokens, shape ``[B, T]``, nats. Never read outside the
            mask.
        mask_BT: Response tokens that count, shape ``[B, T]``; gaps are skipped.
        mean: Take the geometric mean of the prefix's ratios instead of their product.

    Returns:
        Log-ratios, nats; starts of actions (the mask itself), bool; tokens per action (1); each of
        shape ``[B, T]``.

    Raises:
        ValueError: If the shapes differ.

    >>> log_ratios, mask = torch.tensor([[0.1, 9.0, 0.3]]), torch.tensor([[True, False, True]])
    >>> prefix_log_ratios(log_ratios, mask)[0]
    tensor([[0.1000, 0.0000, 0.4000]])
    >>> prefix_log_ratios(log_ratios, mask, mean=True)[0]
    tensor([[0.1000, 0.0000, 0.2000]])
    """
    check(log_ratios_BT=log_ratios_BT, mask_BT=mask_BT)
    masked_BT = log_ratios_BT.masked_fill(~mask_BT, 0)
    prefix_BT = masked_BT.detach().cumsum(1)
    if mean:
        prefix_BT = prefix_BT / mask_BT.cumsum(1).clamp(min=1)
    log_ratios_BU = torch.where(mask_BT, prefix_BT + masked_BT - masked_BT.detach(), 0)
    return log_ratios_BU, mask_BT, mask_BT.to(masked_BT)


def forward_trace(log_ratios_BT: Tensor, mask_BT: Tensor, *, steps: int) -> Tensor:
    """Return for each token the product of the ratios of the next N - 1 tokens, without gradient.

        C_t = sg(Π_{n=1}^{N-1} r_{t+n})        (NFPO, arXiv:2605.20865 [P, abstract; form I])

    Tokens behind the end have ratio 1. Tokens outside the mask, such as the output of a tool, are
    skipped: both policies give them the same probability. With N >= T the product is over all tokens
    ahead.

    Args:
        log_ratios_BT: log(π / π_old) of the tokens, shape ``[B, T]``, nats. Never read outside the
            mask.
        mask_BT: Response tokens that count, shape ``[B, T]``.
        steps: N, number of tokens, the current one included; with 1 all factors are 1.

    Returns:
        Factors, shape ``[B, T]``, 1 outside the mask. Their logarithms are clamped to ±20.

    Raises:
        ValueError: If the shapes differ or N is below 1.

    >>> log_ratios, mask = torch.tensor([[2.0, 3.0, 0.5]]).log(), torch.ones(1, 3).bool()
    >>> forward_trace(log_ratios, mask, steps=2)
    tensor([[3.0000, 0.5000, 1.0000]])
    >>> forward_trace(log_ratios, mask, steps=9)
    tensor([[1.5000, 0.5000, 1.0000]])
    """
    check(log_ratios_BT=log_ratios_BT, mask_BT=mask_BT)
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    # the tokens of each row side by side, so that windows skip gaps
    order_BT = (~mask_BT).int().argsort(dim=1, stable=True)
    masked_BT = log_ratios_BT.detach().masked_fill(~mask_BT, 0).double()
    dense_BT = masked_BT.gather(1, order_BT)
    # sums of windows as differences of prefix sums
    sums_BT = dense_BT.cumsum(1)
    here = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_T = (here + steps - 1).clamp(max=mask_BT.shape[1] - 1)
    ahead_BT = torch.zeros_like(masked_BT).scatter(1, order_BT, sums_BT[:, last_T] - sums_BT)
    return safe_ratio(torch.where(mask_BT, ahead_BT, 0)).to(log_ratios_BT)
