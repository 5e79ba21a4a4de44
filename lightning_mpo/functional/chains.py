"""Chains of subproblems: the probability that a policy solves all of them.

Letters: S subproblems of all problems, P problems.
"""

import torch
from torch import Tensor


def all_solved(rates_S: Tensor, problem_S: Tensor, problems: int) -> Tensor:
    r"""Return for each problem the probability that all its subproblems are solved.

    $$q_p = \prod_{s \in p} r_s$$

    Each subproblem is tried by itself, with the right answers to the earlier ones, so tries are
    independent and the product of unbiased rates is unbiased. With one try per subproblem q is 0 or
    1. Its mean over problems is SPARKLE's SSR [P], whose definition we have not seen in full [I].

    Args:
        rates_S: r, share of right tries of each subproblem, shape `[S]`.
        problem_S: p, number of the problem of each subproblem, from 0; int64, shape `[S]`.
        problems: P; a problem without a subproblem has NaN.

    Returns:
        q, probabilities, float64, shape `[P]`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> all_solved(torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0, 0, 2]), 3)
        tensor([0.5000,    nan, 0.5000], dtype=torch.float64)
    """
    if rates_S.shape != problem_S.shape:
        raise ValueError(
            f"`rates_S` and `problem_S` must have one shape, got {tuple(rates_S.shape)} and "
            f"{tuple(problem_S.shape)}"
        )
    ones_P = torch.ones(problems, dtype=torch.float64)
    solved_P = ones_P.scatter_reduce(0, problem_S, rates_S.double(), "prod")
    has_none_P = torch.bincount(problem_S, minlength=problems) == 0
    return solved_P.masked_fill(has_none_P, torch.nan)
