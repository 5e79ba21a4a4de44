"""Which contexts a policy solves before and after training: support shift.

Measures of RL for protein language models (arXiv:2510.01571, `analysis/metrics.py` of its code
[C]). The unit is the context. P is the number of contexts, G that of samples of each.
"""

import math

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import same


def solved(scores_PG: Tensor, threshold: float, k: int) -> Tensor:
    """Return the contexts that one of the first k samples solves.

        S = {p : max(score_p1, …, score_pk) >= threshold}

    Args:
        scores_PG: Score of each sample, floating point; NaN: not judged, and not solved. Shape
            ``[P, G]``.
        threshold: Least score of a solution.
        k: Samples that count, 1 to G.

    Returns:
        Bool, shape ``[P]``.

    Raises:
        ValueError: If k is out of range.

    >>> solved(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), 0.5, k=2)
    tensor([ True, False])
    """
    G = scores_PG.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"`k` must be from 1 to {G}, the number of samples, got {k}")
    return (scores_PG[:, :k] >= threshold).any(1)


def shift(base_P: Tensor, trained_P: Tensor) -> dict[str, Tensor]:
    """Divide the contexts by who solves them.

        preserved = S_b ∩ S_t,   expansion = S_t − S_b,   shrinkage = S_b − S_t,   out of support: rest

    Args:
        base_P: Contexts that the base policy solves, bool, shape ``[P]``.
        trained_P: Contexts that the trained policy solves, bool, shape ``[P]``.

    Returns:
        By name, 1 for the contexts of this part and 0 for the others, float64, shape ``[P]``. The
        four add up to 1 for each context.

    Raises:
        ValueError: If the shapes differ.

    >>> parts = shift(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    >>> {name: int(part.sum()) for name, part in parts.items()}
    {'preserved': 1, 'expansion': 0, 'shrinkage': 1, 'out_of_support': 1}
    """
    same(base_mask_P=base_P, trained_mask_P=trained_P)
    return {
        "preserved": (base_P & trained_P).double(),
        "expansion": (trained_P & ~base_P).double(),
        "shrinkage": (base_P & ~trained_P).double(),
        "out_of_support": (~base_P & ~trained_P).double(),
    }


def expansion_ratio(expansion: float, shrinkage: float) -> float:
    """Return the expansion-shrinkage ratio, ESR.

        ESR = expansion / shrinkage      0 if both are 0, infinite if only shrinkage is [C]

    Above 1 training has solved more new contexts than it has lost.

    Args:
        expansion: Number of contexts, at least 0.
        shrinkage: Number of contexts, at least 0.

    Raises:
        ValueError: If a number is negative.

    >>> expansion_ratio(14, 21), expansion_ratio(0, 0), expansion_ratio(3, 0)
    (0.6666666666666666, 0.0, inf)
    """
    if expansion < 0 or shrinkage < 0:
        raise ValueError(f"numbers must be at least 0, got {expansion} and {shrinkage}")
    if not shrinkage:
        return math.inf if expansion else 0.0
    return expansion / shrinkage


def expansion_ratio_interval(
    expansion: int, shrinkage: int, level: float = 0.95
) -> tuple[float, float]:
    """Return a confidence interval of the ESR over contexts.

    Given their sum n, the expansion is binomial with q = ESR / (1 + ESR). The ends are those of
    Wilson's interval of q, as q / (1 − q) [I].

        q = (2 e + z² ± z √(z² + 4 e s / n)) / (2 (n + z²)),     ESR = q / (1 − q)

    Args:
        expansion: Number of contexts, e.
        shrinkage: Number of contexts, s.
        level: Probability that the interval holds the true ratio, if contexts are drawn at random.

    Returns:
        Lower and upper end; 0 and infinity if no context has changed.

    Raises:
        ValueError: If a number is negative, or the level not between 0 and 1.

    >>> low, high = expansion_ratio_interval(10, 10)
    >>> low < 1 < high, round(low * high, 6)
    (True, 1.0)
    """
    if expansion < 0 or shrinkage < 0 or not 0 < level < 1:
        raise ValueError(
            "numbers must be at least 0 and `level` between 0 and 1, got "
            f"{expansion}, {shrinkage} and {level}"
        )
    n = expansion + shrinkage
    if not n:
        return 0.0, math.inf
    z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
    root = z * math.sqrt(z * z + 4 * expansion * shrinkage / n)
    ends = [(2 * expansion + z * z + sign * root) / (2 * (n + z * z)) for sign in (-1, 1)]
    # one side without a context: rounding must not pass the ends of [0, 1]
    low = 0.0 if not expansion else ends[0] / (1 - ends[0])
    high = math.inf if not shrinkage else ends[1] / (1 - ends[1])
    return low, high


def ratio_gap(training: float, independent: float) -> float:
    """Return delta-ESR: the ESR under the training reward minus that under an independent evaluator.

    Far above 0 the training reward rose where the evaluator did not: reward hacking [C]. Two
    infinite ratios have no difference: NaN.

    >>> ratio_gap(2.0, 0.5), ratio_gap(math.inf, 0.5), ratio_gap(math.inf, math.inf)
    (1.5, inf, nan)
    """
    return training - independent
