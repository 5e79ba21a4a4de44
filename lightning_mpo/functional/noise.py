"""Noise of masked language models: hidden tokens of each copy of a row, and weights of its log-probs.

A masked model assigns no log-prob to a response by the chain rule. It is estimated from copies of
the row, in which some tokens are hidden:

    log-prob of token t = Σ_c w_c[t] · log p(y_t | the row without the tokens hidden in copy c)

Copies and weights are drawn once and used again by old, new and reference policy. Differences of
estimates then have far less variance than with noise of their own (docs/algorithms.md 17.1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


class Copies(NamedTuple):
    """Noised copies of responses."""

    hidden_BCT: Tensor
    """Tokens that a copy hides, bool, shape ``[B, C, T]``."""
    weights_BCT: Tensor
    """Factors of the tokens' log-probs, float32, shape ``[B, C, T]``; 0: the token is not scored."""


def stratified(uniform: Tensor, parts: int) -> Tensor:
    """Spread one uniform number over equal parts of [0, 1), in the last dimension.

        u_i = frac(u + i / parts),   i = 0 … parts - 1

    Each u_i is uniform, and they are 1 / parts apart.

    Args:
        uniform: Numbers in [0, 1), any shape.
        parts: Numbers to return for each, at least 1.

    >>> stratified(torch.tensor([0.75]), 2)
    tensor([[0.7500, 0.2500]])
    """
    steps = torch.arange(parts, dtype=uniform.dtype, device=uniform.device) / parts
    return (uniform[..., None] + steps).frac()


def whole_numbers(uniform: Tensor, least: Tensor | int, most: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into whole numbers from `least` to `most`, each as probable.

        n = least + floor(u · (most + 1 - least))

    Args:
        uniform: u, any shape.
        least: Smallest number.
        most: Largest number; it broadcasts with `uniform`.

    Returns:
        n, int64.

    >>> whole_numbers(torch.tensor([0.0, 0.5, 0.99]), 1, torch.tensor([4, 4, 4]))
    tensor([1, 3, 4])
    """
    count = most + 1 - least
    return torch.minimum((uniform * count).floor().long(), count - 1) + least


def random_subsets(uniform_BT: Tensor, mask_BT: Tensor, size_B: Tensor) -> Tensor:
    """Choose `size_B` tokens of each row, every subset of that size as probable.

    Args:
        uniform_BT: Independent uniform numbers, shape ``[B, T]``.
        mask_BT: Tokens to choose from, shape ``[B, T]``.
        size_B: Number of tokens, at most those of the mask, shape ``[B]``, int64.

    Returns:
        Bool, shape ``[B, T]``: the tokens with the smallest numbers.

    Raises:
        ValueError: If the shapes differ.

    >>> uniform, mask = torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[True, False, True]])
    >>> random_subsets(uniform, mask, torch.tensor([1]))
    tensor([[False, False,  True]])
    """
    check(uniform_BT=uniform_BT, mask_BT=mask_BT)
    order_BT = uniform_BT.masked_fill(~mask_BT, torch.inf).argsort(dim=1, stable=True)
    rank_BT = torch.empty_like(order_BT).scatter_(
        1, order_BT, torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    )
    return (rank_BT < size_B[:, None]) & mask_BT


def coupled_copies(uniform_BT: Tensor, mask_BT: Tensor, size_B: Tensor, pairs: int) -> Copies:
    """Hide a random subset in one copy, and its complement in another (ESPO [C]).

        m a random subset of x of L tokens,  x uniform on 0 … L
        ELBO = ½ [ (L+1)/x · Σ_{t in m} log p(y_t | m hidden)
                 + (L+1)/(L-x) · Σ_{t not in m} log p(y_t | the others hidden) ]

    Each of the two terms is an unbiased estimate [V]. A term without tokens is 0.

    Args:
        uniform_BT: Independent uniform numbers, shape ``[B, T]``.
        mask_BT: Tokens of the response, L of them in a row, shape ``[B, T]``.
        size_B: x, shape ``[B]``, int64.
        pairs: Number of pairs whose mean is taken; the weights are divided by it.

    Returns:
        Two copies, in which each token has one weight above 0.

    Raises:
        ValueError: If the shapes differ.

    >>> mask, uniform = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.3, 0.1, 0.2]])
    >>> coupled_copies(uniform, mask, torch.tensor([1]), 1).weights_BCT
    tensor([[[0., 2., 0.],
             [1., 0., 1.]]])
    """
    chosen_BT = random_subsets(uniform_BT, mask_BT, size_B)
    hidden_BCT = torch.stack([chosen_BT, mask_BT & ~chosen_BT], 1)
    length_B = mask_BT.sum(1)
    counts_BC = hidden_BCT.sum(2).clamp(min=1)
    factor_BC = (length_B[:, None] + 1) / (2 * pairs * counts_BC)
    return Copies(hidden_BCT, (factor_BC[..., None] * hidden_BCT).float())


def subset_copies(uniform_BT: Tensor, mask_BT: Tensor, size_B: Tensor) -> Copies:
    """Hide a random subset (the ELBO of LLaDA in its discrete form [C]; BGPO [P]).

        ELBO = E_{l uniform on 1 … L} E_{|m| = l} [ L/l · Σ_{t in m} log p(y_t | m hidden) ]

    Args:
        uniform_BT: Independent uniform numbers, shape ``[B, T]``.
        mask_BT: Tokens of the response, L of them in a row, shape ``[B, T]``.
        size_B: l, at least 1, shape ``[B]``, int64.

    Returns:
        One copy.

    Raises:
        ValueError: If the shapes differ.

    >>> mask, uniform = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.3, 0.1, 0.2, 0.4]])
    >>> subset_copies(uniform, mask, torch.tensor([2])).weights_BCT
    tensor([[[0., 2., 2., 0.]]])
    """
    hidden_BT = random_subsets(uniform_BT, mask_BT, size_B)
    factor_B = mask_BT.sum(1) / size_B.clamp(min=1)
    return Copies(hidden_BT[:, None], (factor_B[:, None] * hidden_BT).float()[:, None])


def independent_copies(
    uniform_BT: Tensor, mask_BT: Tensor, uniform_B: Tensor, least: float
) -> Copies:
    """Hide each token by itself, with one probability for a row (the loss of LLaDA [C]).

        p = (1 - least)·u + least,   u uniform in [0, 1)
        ELBO ≈ E_u E_hidden [ 1/p · Σ_{t hidden} log p(y_t | the tokens that are not hidden) ]

    It is the continuous form of the ELBO, without its part below `least`.

    Args:
        uniform_BT: Independent uniform numbers, shape ``[B, T]``.
        mask_BT: Tokens of the response, shape ``[B, T]``.
        uniform_B: u, shape ``[B]``.
        least: Smallest probability of hiding a token; it bounds the weights.

    Returns:
        One copy.

    Raises:
        ValueError: If the shapes differ.

    >>> mask, uniform = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.3, 0.1, 0.9]])
    >>> independent_copies(uniform, mask, torch.tensor([0.5]), 0.0).weights_BCT
    tensor([[[2., 2., 0.]]])
    """
    check(uniform_BT=uniform_BT, mask_BT=mask_BT)
    probability_B1 = ((1 - least) * uniform_B + least)[:, None]
    hidden_BT = (uniform_BT < probability_B1) & mask_BT
    return Copies(hidden_BT[:, None], (hidden_BT / probability_B1).float()[:, None])


def replayed_copies(reveal_BT: Tensor, step_BC: Tensor) -> Copies:
    """Hide the tokens that a sampler had not revealed before a step, and score those of the step.

        hidden_c[t] = reveal[t] ≥ s_c,   w_c[t] = 1 if reveal[t] = s_c, else 0      (AGRPO [C])

    The copy of step s is the row that the sampler saw at step s.

    Args:
        reveal_BT: Step at which each token was revealed, int, shape ``[B, T]``.
        step_BC: s, shape ``[B, C]``.

    Returns:
        C copies.

    >>> replayed_copies(torch.tensor([[0, 2, 1]]), torch.tensor([[1]])).hidden_BCT
    tensor([[[False,  True,  True]]])
    """
    reveal_BCT, step_BCT = reveal_BT[:, None], step_BC[..., None]
    return Copies(reveal_BCT >= step_BCT, (reveal_BCT == step_BCT).float())


def low_discrepancy(order_BN: Tensor, uniform_BN: Tensor) -> Tensor:
    """Return n uniform numbers for each row, one from each of n equal parts of [0, 1).

        u[b, i] = (i + (π_i(b) + v[b, i]) / B) / n

    Of all numbers together, one is in each of B · n equal parts. AGRPO has this property alone, as
    its permutation is over all B · n numbers [C]. Here the numbers of a row are also spread, which
    lowers the variance of the row's mean [I].

    Args:
        order_BN: π, a random permutation of 0 … B - 1 in each column, shape ``[B, N]``.
        uniform_BN: v, independent uniform numbers, shape ``[B, N]``.

    Returns:
        u, shape ``[B, N]``.

    >>> low_discrepancy(torch.tensor([[1, 0], [0, 1]]), torch.full((2, 2), 0.5))
    tensor([[0.3750, 0.6250],
            [0.1250, 0.8750]])
    """
    B, N = uniform_BN.shape
    return (torch.arange(N, device=uniform_BN.device) + (order_BN + uniform_BN) / B) / N


def step_probabilities(entropy_BT: Tensor, reveal_BT: Tensor, last_B: Tensor, steps: int) -> Tensor:
    """Return probabilities of steps in proportion to the entropy of the tokens that each revealed.

        q(s) ∝ Σ_{t: reveal[t] = s} H_t   for s = 0 … last;  uniform if all are 0      (AGRPO [C])

    Args:
        entropy_BT: Of the distribution that each token was drawn from, nats, shape ``[B, T]``.
        reveal_BT: Step at which each token was revealed, shape ``[B, T]``; `steps` for none.
        last_B: Last step that counts, shape ``[B]``.
        steps: Number of steps of the sampler.

    Returns:
        q, shape ``[B, steps]``, float32; rows sum to 1.

    Raises:
        ValueError: If `entropy_BT` has no two axes.

    >>> entropy, reveal = torch.tensor([[1.0, 3.0]]), torch.tensor([[0, 1]])
    >>> step_probabilities(entropy, reveal, torch.tensor([1]), 2)
    tensor([[0.2500, 0.7500]])
    """
    check(entropy_BT=entropy_BT)
    # entropies of the tokens of each step; one column more for tokens of no step
    sums_BS = torch.zeros(len(last_B), steps + 1, device=entropy_BT.device)
    sums_BS = sums_BS.scatter_add(1, reveal_BT.long(), entropy_BT.float().clamp(min=0))[:, :steps]
    counts_BS = torch.arange(steps, device=last_B.device) <= last_B[:, None]
    sums_BS = sums_BS * counts_BS
    flat_B = sums_BS.sum(1) <= 0
    sums_BS = torch.where(flat_B[:, None], counts_BS.float(), sums_BS)
    return sums_BS / sums_BS.sum(1, keepdim=True)


def draw_steps(uniform_BN: Tensor, probabilities_BS: Tensor) -> Tensor:
    """Draw steps by inverse cumulative probability; a step of probability 0 is never drawn.

    Args:
        uniform_BN: Numbers in [0, 1), shape ``[B, N]``.
        probabilities_BS: Probability of each of S steps; rows sum to 1, shape ``[B, S]``.

    Returns:
        Steps, int64, shape ``[B, N]``.

    >>> draw_steps(torch.tensor([[0.1, 0.5]]), torch.tensor([[0.25, 0.75]]))
    tensor([[0, 1]])
    """
    cumulative_BS = probabilities_BS.double().cumsum(1)
    # a number that rounding puts behind the last step of a positive probability counts as that step
    top_B = cumulative_BS[:, -1:]
    target_BN = torch.minimum(uniform_BN.double() * top_B, top_B * (1 - 1e-12))
    return torch.searchsorted(cumulative_BS.contiguous(), target_BN.contiguous(), right=True)
