"""Which actions have left the trust region: by their ratio (a clip), or by the distance of
distributions.

Distances are over the few probabilities of a distribution that are known.

The binary divergence knows the sampled token and all others, the bucketed one the most probable ids
and all others (DPPO, arXiv:2602.04879 [P, C]; docs/algorithms.md 5.6). Both are lower bounds of the
divergence over the vocabulary, of the policy that sampled from the current one, and the finer one
is not below the coarser.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same

CLOSEST_TO_CERTAIN = 1e-7
"""Probabilities count as at least this far from 0 and 1 in logarithms: float32 does not resolve
more near 1.
"""


def outside_clip(
    ratios: Tensor,
    advantages: Tensor,
    *,
    low: float | Tensor,
    high: float | Tensor,
    dual: float | None = None,
) -> Tensor:
    """Mark the actions whose gradient a clip has stopped: their ratio has gone too far in the
    direction of learning.

        (A > 0 and r > 1 + high)   or   (A < 0 and (r < 1 - low or r > dual))
                                                                            (docs/algorithms.md 5.2)

    The share of such actions falls mechanically with the share of future tokens in a block [V]
    (docs/algorithms.md 15). It is no evidence of better credit.

    Args:
        ratios: Ratios of actions, any shape.
        advantages: Advantages of the actions, same shape.
        low: How far a ratio may fall below 1, in (0, 1); one number, or one for each action.
        high: How far a ratio may rise above 1, above 0; likewise.
        dual: Largest ratio of an action with a negative advantage, above 1. None: no bound.

    Returns:
        Bool, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> ratios, gains = torch.tensor([1.5, 1.5, 0.5]), torch.tensor([1.0, -1.0, -1.0])
    >>> outside_clip(ratios, gains, low=0.2, high=0.2)
    tensor([ True, False,  True])
    """
    same(ratios=ratios, advantages=advantages)
    above = (ratios > 1 + high) & (advantages > 0)
    below = (ratios < 1 - low) & (advantages < 0)
    if dual is not None:
        below = below | ((ratios > dual) & (advantages < 0))
    return above | below


def binary_tv(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Measure how far the probability of the sampled token has moved: the total variation of
    (token, all others).

        D_TV = |μ(o) - π(o)| = μ(o) |r - 1|   (DPPO Eq. 14-16 [P, C]; docs/algorithms.md 5.6)

    A lower bound of the total variation over the vocabulary.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        behaviour_logprobs: The same under the policy that sampled, same shape.

    Returns:
        Probabilities in [0, 1], same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> binary_tv(torch.tensor([0.8]).log(), torch.tensor([0.99]).log())
    tensor([0.1900])
    """
    same(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    return (logprobs.exp() - behaviour_logprobs.exp()).abs()


def binary_kl(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Measure the KL divergence of (token, all others) from the policy that sampled to the current
    one.

        D_KL = μ log(μ / π) + (1 - μ) log((1 - μ) / (1 - π))  (DPPO Eq. 14-16 [P, C];
        docs/algorithms.md 5.6)

    At least 2 D_TV² (Pinsker), and a lower bound of the divergence over the vocabulary. 1 - e^x is
    taken through expm1 and log1p, exact up to probabilities of 1 - 1e-7.

    Args:
        logprobs: Log-probabilities of the sampled tokens, any shape, nats.
        behaviour_logprobs: The same under the policy that sampled, same shape.

    Returns:
        Divergences in nats, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> binary_kl(torch.tensor([0.8]).log(), torch.tensor([0.99]).log())
    tensor([0.1810])
    """
    same(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    now, then = (x.clamp(max=-CLOSEST_TO_CERTAIN) for x in (logprobs, behaviour_logprobs))
    others = _log1mexp(then)
    return then.exp() * (then - now) + others.exp() * (others - _log1mexp(now))


def bucket_tv(logprobs_K: Tensor, behaviour_logprobs_K: Tensor) -> Tensor:
    """Measure the total variation over some ids and one bucket for all others.

        D_TV = 1/2 Σ_bucket |μ - π|   (DPPO top-K [P, C]; docs/algorithms.md 5.6)

    Not below :func:`binary_tv` of any of the ids, not above the total variation over the
    vocabulary.

    Args:
        logprobs_K: Log-probabilities of distinct ids, shape ``[..., K]``, nats; -inf where a slot
            holds none.
        behaviour_logprobs_K: The same under the policy that sampled, same shape.

    Returns:
        Probabilities in [0, 1], shape ``[...]``.

    Raises:
        ValueError: If the shapes differ.

    >>> bucket_tv(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.6, 0.3]]).log())
    tensor([0.2000])
    """
    same(logprobs_K=logprobs_K, behaviour_logprobs_K=behaviour_logprobs_K)
    now, then = _buckets(logprobs_K), _buckets(behaviour_logprobs_K)
    return (now - then).abs().sum(-1) / 2


def bucket_kl(logprobs_K: Tensor, behaviour_logprobs_K: Tensor) -> Tensor:
    """Measure the KL divergence over some ids and one bucket for all others, from the policy that
    sampled.

        D_KL = Σ_bucket μ log(μ / π)   (DPPO top-K [P, C]; docs/algorithms.md 5.6)

    Args:
        logprobs_K: Log-probabilities of distinct ids, shape ``[..., K]``, nats; -inf where a slot
            holds none.
        behaviour_logprobs_K: The same under the policy that sampled, same shape.

    Returns:
        Divergences in nats, shape ``[...]``; the bucket of the others counts with at least 1e-7 of
        the mass.

    Raises:
        ValueError: If the shapes differ.

    >>> bucket_kl(torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.6, 0.3]]).log())
    tensor([0.1212])
    """
    same(logprobs_K=logprobs_K, behaviour_logprobs_K=behaviour_logprobs_K)
    now, then = (
        _buckets(x).clamp(min=CLOSEST_TO_CERTAIN) for x in (logprobs_K, behaviour_logprobs_K)
    )
    return (then * (then.log() - now.log())).sum(-1)


def trust_divergence(
    logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    candidate_logprobs_BTK: Tensor | None = None,
    behaviour_candidate_logprobs_BTK: Tensor | None = None,
) -> Tensor:
    """Measure how far the distribution behind each token has moved, over the ids that are known, in
    float32.

    The binary divergence of (token, all others), or that over the candidates and one bucket for all
    others (DPPO Eq. 14-16 and top-K [P, C]; docs/algorithms.md 5.6).

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats.
        behaviour_logprobs_BT: The same as recorded by the sampler, shape ``[B, T]``.
        divergence: "tv", in probability, or "kl", in nats.
        candidate_logprobs_BTK: Of distinct ids, shape ``[B, T, K]``, -inf in slots without one.
            None: binary divergence.
        behaviour_candidate_logprobs_BTK: The same under the policy that sampled.

    Returns:
        Divergences without gradient, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, the name is unknown, or candidates are given for one policy
            only.

    >>> trust_divergence(torch.tensor([[0.8]]).log(), torch.tensor([[0.99]]).log())
    tensor([[0.1900]])
    """
    check(
        logprobs_BT=logprobs_BT,
        behaviour_logprobs_BT=behaviour_logprobs_BT,
        candidate_logprobs_BTK=candidate_logprobs_BTK,
        behaviour_candidate_logprobs_BTK=behaviour_candidate_logprobs_BTK,
    )
    if divergence not in ("tv", "kl"):
        raise ValueError(f"`divergence` must be 'tv' or 'kl', got {divergence!r}")
    if (candidate_logprobs_BTK is None) != (behaviour_candidate_logprobs_BTK is None):
        raise ValueError(
            "`candidate_logprobs_BTK` and `behaviour_candidate_logprobs_BTK` must be given together"
        )
    if candidate_logprobs_BTK is None or behaviour_candidate_logprobs_BTK is None:
        now, then = logprobs_BT.detach().float(), behaviour_logprobs_BT.detach().float()
        return binary_tv(now, then) if divergence == "tv" else binary_kl(now, then)
    now, then = (
        candidate_logprobs_BTK.detach().float(),
        behaviour_candidate_logprobs_BTK.detach().float(),
    )
    return bucket_tv(now, then) if divergence == "tv" else bucket_kl(now, then)


def outside_trust_region(
    logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    *,
    delta: float | tuple[float, float],
    divergence: Literal["tv", "kl"] = "tv",
    candidate_logprobs_BTK: Tensor | None = None,
    behaviour_candidate_logprobs_BTK: Tensor | None = None,
) -> Tensor:
    """Tell which tokens have moved further than a divergence allows, in the direction that their
    advantage pushes.

        (A > 0 and r > 1 and D > up)   or   (A < 0 and r < 1 and D > down)
                                                        (DPPO Eq. 13 [P, C]; docs/algorithms.md 5.6)

    Args:
        logprobs_BT: Log-probabilities of the tokens, shape ``[B, T]``, nats.
        behaviour_logprobs_BT: The same as recorded by the sampler, shape ``[B, T]``.
        advantages_BT: Advantages, shape ``[B, T]``.
        delta: Bound on the divergence, above 0; two numbers bound (falling, rising) probabilities.
        divergence: "tv", in probability, or "kl", in nats.
        candidate_logprobs_BTK: Of distinct ids, shape ``[B, T, K]``, -inf in slots without one.
            None: binary divergence.
        behaviour_candidate_logprobs_BTK: The same under the policy that sampled.

    Returns:
        Bool, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, a bound is not positive, or candidates are given for one
            policy only.

    >>> moved, mu = torch.tensor([[0.8, 0.01]]).log(), torch.tensor([[0.99, 0.0001]]).log()
    >>> outside_trust_region(moved, mu, torch.tensor([[-1.0, 1.0]]), delta=0.15)
    tensor([[ True, False]])
    """
    check(
        logprobs_BT=logprobs_BT,
        behaviour_logprobs_BT=behaviour_logprobs_BT,
        advantages_BT=advantages_BT,
    )
    down, up = (delta, delta) if isinstance(delta, float | int) else delta
    if not (down > 0 and up > 0):
        raise ValueError(f"`delta` must be above 0, got {delta}")
    distance = trust_divergence(
        logprobs_BT,
        behaviour_logprobs_BT,
        divergence=divergence,
        candidate_logprobs_BTK=candidate_logprobs_BTK,
        behaviour_candidate_logprobs_BTK=behaviour_candidate_logprobs_BTK,
    )
    now, then = logprobs_BT.detach().float(), behaviour_logprobs_BT.detach().float()
    gained = (advantages_BT > 0) & (now > then) & (distance > up)
    return gained | ((advantages_BT < 0) & (now < then) & (distance > down))


def _buckets(logprobs_K: Tensor) -> Tensor:
    """Return probabilities with those of all other ids behind them."""
    probabilities = logprobs_K.exp()
    return torch.cat([probabilities, (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _log1mexp(logprobs: Tensor) -> Tensor:
    """Return log(1 - e^x), x < 0."""
    return torch.where(logprobs > -0.6931, (-logprobs.expm1()).log(), (-logprobs.exp()).log1p())
