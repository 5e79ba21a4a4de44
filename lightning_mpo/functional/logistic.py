"""Logistic regression by Newton's method: a small classifier without random numbers."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

STEPS = 200


def fit_logistic(features_NF: Tensor, labels_N: Tensor, ridge: float) -> Tensor:
    """Fit the weights of a logistic regression.

        min over w, b:   −(1/N) Σ_i log σ(y_i (w·x_i + b)) + ridge/2 · |w|²,    y_i = ±1

    The loss is convex, and strictly so in w, so the weights are a function of the data. Newton steps
    are halved until they lower the loss. Sums stand in place of matrix products, whose last bits
    depend on where a tensor lies in memory.

    Args:
        features_NF: Features of N examples, shape ``[N, F]``.
        labels_N: True for the positive class, bool, shape ``[N]``.
        ridge: Weight of the penalty, above 0.

    Returns:
        Weights and, behind them, the bias, float64, shape ``[F + 1]``.

    Raises:
        ValueError: If ridge is not above 0, a class has no example, or a feature is not finite.

    >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> weights = fit_logistic(features, torch.tensor([False, False, True, True]), ridge=0.1)
    >>> (logistic_probabilities(features, weights) > 0.5).tolist()
    [False, False, True, True]
    """
    if not ridge > 0:
        raise ValueError(f"`ridge` must be above 0, got {ridge}")
    if not bool(labels_N.any()) or bool(labels_N.all()):
        raise ValueError("`labels_N` must hold examples of both classes")
    if not bool(features_NF.isfinite().all()):
        raise ValueError("`features_NF` must be finite")
    inputs = pad(features_NF.double(), (0, 1), value=1.0)
    penalty = torch.full((inputs.shape[1],), float(ridge), dtype=torch.float64)
    penalty[-1] = 0.0  # none on the bias
    signs = labels_N.double() * 2 - 1

    def loss(weights: Tensor) -> float:
        fit = -logsigmoid(signs * (inputs * weights).sum(1)).mean()
        return float(fit + (penalty * weights.square()).sum() / 2)

    weights = torch.zeros_like(penalty)
    for _ in range(STEPS):
        p = torch.sigmoid((inputs * weights).sum(1))
        error = (p - labels_N.double())[:, None]
        gradient = (inputs * error).mean(0) + penalty * weights
        if float(gradient.abs().max()) < 1e-10:
            break
        spread = inputs * (p * (1 - p))[:, None]
        rows = [(spread * inputs[:, f : f + 1]).mean(0) for f in range(inputs.shape[1])]
        step = _solve(torch.stack(rows) + penalty.diag(), gradient)
        size, before = 1.0, loss(weights)
        while size > 1e-6 and not loss(weights - size * step) <= before:
            size /= 2
        weights = weights - size * step
    return weights


def _solve(matrix_FF: Tensor, right_F: Tensor) -> Tensor:
    """Solve a positive definite system by elimination, which needs no pivots."""
    table = torch.cat([matrix_FF, right_F[:, None]], 1)
    for f in range(len(right_F)):
        table[f] /= table[f, f].clone()
        others = table[:, f].clone()
        others[f] = 0.0
        table = table - others[:, None] * table[f]
    return table[:, -1]


def logistic_probabilities(features_NF: Tensor, weights_F1: Tensor) -> Tensor:
    """Return the probability of the positive class: σ(w·x + b).

    Args:
        features_NF: Features, shape ``[N, F]``.
        weights_F1: From :func:`fit_logistic`, shape ``[F + 1]``.

    Returns:
        Probabilities, float64, shape ``[N]``.

    >>> logistic_probabilities(torch.zeros(1, 2), torch.zeros(3))
    tensor([0.5000], dtype=torch.float64)
    """
    weights = weights_F1.double()
    return torch.sigmoid((features_NF.double() * weights[:-1]).sum(1) + weights[-1])
