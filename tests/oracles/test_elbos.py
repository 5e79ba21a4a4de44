"""Evidence bounds of a network with 4 letters and 3 tokens, by enumeration of all masks, orders and sequences."""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mpo.functional import noise as F
from lightning_mpo.functional.linear_bound import linear_bound
from lightning_mpo.functional.surrogates import clipped_ratio
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.types import Rollout
from tests.support.builders import seeded
from tests.support.masked_network import BothSides, logprobs_of

LETTERS, L, PROMPT = 4, 3, [2, 0]
NETWORK = BothSides(LETTERS, len(PROMPT) + L)
SETS = [hidden for size in range(L + 1) for hidden in combinations(range(L), size)]
RESPONSES = list(product(range(LETTERS), repeat=L))
some = pytest.mark.parametrize("response", [(0, 1, 2), (3, 3, 3), (1, 0, 3)])


def table(
    network: BothSides, response: tuple[int, ...]
) -> dict[tuple[int, ...], dict[int, Tensor]]:
    """Return the log-probs of hidden tokens for every set of them."""
    row_L = torch.tensor([*PROMPT, *response])
    return {hidden: logprobs_of(network, row_L, set(hidden), L) for hidden in SETS}


Table = dict[tuple[int, ...], dict[int, float]]


@cache
def known(response: tuple[int, ...]) -> Table:
    with torch.no_grad():
        values = table(NETWORK, response)
    return {hidden: {t: float(v) for t, v in row.items()} for hidden, row in values.items()}


def continuous(known: Table) -> float:
    """E_t E_mask [1/t Σ_masked log p], t uniform: a polynomial in t, so the quadrature is exact."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for hidden, row in known.items():
            probability = t ** len(hidden) * (1 - t) ** (L - len(hidden))
            total += weight * probability * sum(row.values()) / t
    return total


def discrete(known: Table) -> float:
    """E_{l = 1 … L} E_{|m| = l} [L/l Σ_masked log p]."""
    total = 0.0
    for size in range(1, L + 1):
        sets = list(combinations(range(L), size))
        total += sum(sum(known[m].values()) for m in sets) / len(sets) / size
    return total


def orders(known: Table) -> list[float]:
    """Return the log-prob along each order of revealing."""
    return [
        sum(known[tuple(sorted(order[k:]))][token] for k, token in enumerate(order))
        for order in permutations(range(L))
    ]


def any_order(known: Table) -> float:
    return sum(orders(known)) / len(orders(known))


def from_copies(known: Table, name: str) -> float:
    """Return the mean of our estimate over all masks and sizes."""
    uniform_BT = torch.tensor([[rank / L for rank in order] for order in permutations(range(L))])
    mask_BT, means = torch.ones_like(uniform_BT, dtype=torch.bool), []
    for size in range(0 if name != "single" else 1, L + 1):
        size_B = torch.full((len(uniform_BT),), size)
        if name == "single":
            copies = F.subset_copies(uniform_BT, mask_BT, size_B)
        else:
            copies = F.coupled_copies(uniform_BT, mask_BT, size_B, 1)
        hidden_BCT, weights_BCT = copies
        if name == "one term":
            hidden_BCT, weights_BCT = hidden_BCT[:, :1], 2 * weights_BCT[:, :1]
        sums = [
            sum(
                float(weights_T[t]) * value
                for hidden_T, weights_T in zip(hidden_CT, weights_CT, strict=True)
                for t, value in known[tuple(hidden_T.nonzero()[:, 0].tolist())].items()
            )
            for hidden_CT, weights_CT in zip(hidden_BCT, weights_BCT, strict=True)
        ]
        means.append(sum(sums) / len(sums))
    return sum(means) / len(means)


def all_forms(known: Table) -> dict[str, float]:
    return {
        "continuous": continuous(known),
        "discrete": discrete(known),
        "any order": any_order(known),
        "ESPO, one term": from_copies(known, "one term"),
        "ESPO, coupled": from_copies(known, "coupled"),
        "BGPO": from_copies(known, "single"),
    }


def gaps_of(tables: list[Table]) -> list[float]:
    """Check that the order-averaged likelihoods sum to 1; return their logs less the bound."""
    likelihoods = [float(np.mean(np.exp(orders(known)))) for known in tables]
    assert sum(likelihoods) == pytest.approx(1, abs=1e-5)
    return [
        float(np.log(value)) - discrete(known)
        for value, known in zip(likelihoods, tables, strict=True)
    ]


@some
def test_all_forms_of_the_bound_agree(response):
    forms = all_forms(known(response))
    assert max(forms.values()) - min(forms.values()) < 1e-6, forms


def test_the_order_averaged_likelihood_sums_to_one_and_lies_above_the_bound():
    gaps = gaps_of([known(y) for y in RESPONSES])
    assert min(gaps) > -1e-9
    assert max(gaps) > 0.01, "the network depends on the order"


def test_a_masked_policy_has_the_same_bounds():
    """A BERT over three letters and the end token, which bars MASK and PAD; log-probs are float32."""
    torch.manual_seed(0)
    policy = TinyMaskedPolicy("abc", hidden_size=16, layers=1, heads=2, initializer_range=0.4)
    policy.build(device=torch.device("cpu"), reference=False)
    ids = [id for id in range(policy.vocabulary) if id not in policy.barred]
    assert len(ids) == LETTERS
    tables = [scored(policy, [ids[letter] for letter in y]) for y in RESPONSES]
    gaps = gaps_of(tables)
    assert min(gaps) > -1e-5
    assert max(gaps) > 1e-3
    for table in tables[::9]:
        forms = all_forms(table)
        assert max(forms.values()) - min(forms.values()) < 1e-5, forms


def scored(policy: TinyMaskedPolicy, response: list[int]) -> Table:
    """Return the log-probs of a policy for every set of hidden tokens, from its scores of copies."""
    tokens_BL = torch.tensor([[*policy.end_tokens, *response]]).repeat(len(SETS), 1)
    hidden_BT = torch.zeros(len(SETS), L, dtype=torch.bool)
    for b, hidden in enumerate(SETS):
        hidden_BT[b, list(hidden)] = True
    everything_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    rollout = Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=everything_BL,
        response_mask_BT=everything_BL[:, 1:],
        group_B=torch.zeros(len(SETS), dtype=torch.int64),
        behaviour_logprobs_BT=torch.zeros(len(SETS), L),
        finish_B=torch.zeros(len(SETS), dtype=torch.int64),
        hidden_BCL=torch.cat([~everything_BL[:, :1], hidden_BT], 1)[:, None],
        copy_weights_BCT=hidden_BT.float()[:, None],
    )
    with torch.no_grad():
        logprobs_BT = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
    return {hidden: {t: float(logprobs_BT[b, t]) for t in hidden} for b, hidden in enumerate(SETS)}


def test_the_mean_field_lies_on_either_side_of_the_bound():
    everything = tuple(range(L))
    gaps = [sum(known(y)[everything].values()) - discrete(known(y)) for y in RESPONSES]
    assert min(gaps) < 0 < max(gaps)


def samples(network: BothSides, response: tuple[int, ...], n: int = 6) -> Tensor:
    """Return n samples of the ELBO under the same masks for every network, `[n]`."""
    uniform_BT = torch.rand(n, L, generator=seeded(3))
    mask_BT = torch.ones(n, L, dtype=torch.bool)
    size_B = F.whole_numbers(torch.rand(n, generator=seeded(4)), 1, mask_BT.sum(1))
    hidden_BCT, weights_BCT = F.subset_copies(uniform_BT, mask_BT, size_B)
    values = table(network, response)
    return torch.stack(
        [
            sum(
                (
                    float(weights_CT[0, t]) * value
                    for t, value in values[tuple(hidden_CT[0].nonzero()[:, 0].tolist())].items()
                ),
                torch.zeros((), dtype=torch.float64),
            )
            for hidden_CT, weights_CT in zip(hidden_BCT, weights_BCT, strict=True)
        ]
    )


def moved(size: float) -> BothSides:
    """Return the network with noise on its weights."""
    network, g = BothSides(LETTERS, len(PROMPT) + L), seeded(5)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=g, dtype=torch.float64))
    return network


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("size", [0.0, 0.01, 0.3])
@some
def test_bgpo_bounds_its_target_and_touches_it_at_the_old_policy(response, size, advantage):
    network, old_N = moved(size), samples(NETWORK, response).detach()
    d_N = samples(network, response) - old_N
    bound = -linear_bound(d_N[None], torch.full_like(d_N[None], advantage)).mean()
    target = advantage * d_N.mean().exp()
    assert float(bound) <= float(target) + 1e-12
    if size == 0.0:
        assert float(bound) == pytest.approx(advantage)
        torch.testing.assert_close(*both_gradients(response, advantage))


def both_gradients(response: tuple[int, ...], advantage: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of bound and target at the old policy."""
    old_N, network = samples(NETWORK, response).detach(), moved(0.0)
    d_N = samples(network, response) - old_N
    bound = -linear_bound(d_N[None], torch.full_like(d_N[None], advantage)).mean()
    first = network.flat_gradient(bound)
    d_N = samples(network, response) - old_N
    return first, network.flat_gradient(advantage * d_N.mean().exp())


REVEAL = torch.tensor([[1, 0, 2]])
ENTROPY = torch.tensor([[2.0, 1.0, 5.0]])


def step_loss(network: BothSides, response: tuple[int, ...], step: int, advantage: float) -> Tensor:
    """Return AGRPO's loss of one step: the clipped ratio of its tokens in the state before it."""
    copies = F.replayed_copies(REVEAL, torch.tensor([[step]]))
    hidden = tuple(copies.hidden_BCT[0, 0].nonzero()[:, 0].tolist())
    now, then = table(network, response)[hidden], known(response)[hidden]
    losses = []
    for t in copies.weights_BCT[0, 0].nonzero()[:, 0].tolist():
        log_ratio = (now[t] - then[t])[None, None]
        advantages = torch.full_like(log_ratio, advantage)
        losses.append(clipped_ratio(log_ratio, advantages, low=0.2, high=0.2).sum())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("importance", ["uniform", "entropy"])
@pytest.mark.parametrize("size", [0.0, 0.2])
@some
def test_all_steps_together_are_the_expectation_of_agrpo(response, size, importance):
    """The gradient over all steps, each weighted 1/(last + 1), is the mean gradient over drawn steps."""
    network, last, cells = moved(size), 2, 8 * 9
    gradients = [
        network.flat_gradient(step_loss(network, response, step, 1.3)) for step in range(last + 1)
    ]
    exact = torch.stack(gradients).mean(0)
    uniform_1N = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells)[None]
    if importance == "uniform":
        step_N = F.whole_numbers(uniform_1N, 0, torch.tensor([[last]]))[0]
        weight_N = torch.ones(cells, dtype=torch.float64)
    else:
        q_1S = F.step_probabilities(ENTROPY, REVEAL, torch.tensor([last]), last + 1)
        step_N = F.draw_steps(uniform_1N, q_1S)[0]
        weight_N = 1 / ((last + 1) * q_1S[0].double()[step_N])
    mean = (torch.stack(gradients)[step_N] * weight_N[:, None]).mean(0)
    torch.testing.assert_close(mean, exact, atol=1e-6, rtol=1e-5)
    if size == 0.0:  # then it is the policy gradient along the order of the sampler, per step
        values = table(network, response)
        along = values[(0, 1, 2)][1] + values[(0, 2)][0] + values[(2,)][2]
        expected = -1.3 * network.flat_gradient(along) / (last + 1)
        torch.testing.assert_close(exact, expected, atol=1e-9, rtol=1e-7)
