"""Noised copies: their masks, weights and steps, with expectations by enumeration."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional import noise as F
from lightning_mpo.types import NEVER
from tests.support.builders import seeded

LENGTHS = [1, 2, 3, 4]


def masks(B: int = 40, T: int = 9) -> Tensor:
    """Return random response masks with gaps; the first token is always part of it."""
    mask_BT = torch.rand(B, T, generator=seeded(0)) < 0.7
    mask_BT[:, 0] = True
    return mask_BT


def table(L: int) -> dict[tuple[int, ...], Tensor]:
    """Return any log-probs `[L]` for each set of hidden tokens, as a network would give them."""
    sets = [hidden for size in range(L + 1) for hidden in combinations(range(L), size)]
    return {
        hidden: torch.randn(L, generator=seeded(100 + number), dtype=torch.float64)
        for number, hidden in enumerate(sets)
    }


def any_order(logprobs: dict[tuple[int, ...], Tensor], L: int) -> float:
    """Return the mean over all orders of the sum of log-probs, each token given those before it."""
    orders = list(permutations(range(L)))
    total = 0.0
    for order in orders:
        for k, token in enumerate(order):
            total += float(logprobs[tuple(sorted(order[k:]))][token])
    return total / len(orders)


def estimate(copies: F.Copies, logprobs: dict[tuple[int, ...], Tensor]) -> Tensor:
    """Return the estimate of each row, `[B]`."""
    sums = []
    for hidden_CT, weights_CT in zip(copies.hidden_BCT, copies.weights_BCT, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for hidden_T, weights_T in zip(hidden_CT, weights_CT, strict=True):
            total += (weights_T.double() * logprobs[tuple(hidden_T.nonzero()[:, 0].tolist())]).sum()
        sums.append(total)
    return torch.stack(sums)


def all_orders(L: int) -> Tensor:
    """Return numbers in [0, 1) in each order once, which gives each subset of a size as often."""
    return torch.tensor([[rank / L for rank in order] for order in permutations(range(L))])


def test_a_subset_has_its_size_and_stays_within_the_mask():
    mask_BT = masks()
    size_B = (torch.rand(len(mask_BT), generator=seeded(1)) * (mask_BT.sum(1) + 1)).long()
    uniform_BT = torch.rand(mask_BT.shape, generator=seeded(2))
    chosen_BT = F.random_subsets(uniform_BT, mask_BT, size_B)
    assert torch.equal(chosen_BT.sum(1), size_B)
    assert not (chosen_BT & ~mask_BT).any()


def test_every_subset_of_a_size_is_as_probable():
    uniform_BT = all_orders(4)
    mask_BT = torch.ones_like(uniform_BT, dtype=torch.bool)
    for size in range(5):
        chosen_BT = F.random_subsets(uniform_BT, mask_BT, torch.full((24,), size))
        _, counts = chosen_BT.int().unique(dim=0, return_counts=True)
        assert len(set(counts.tolist())) == 1
        assert len(counts) == len(list(combinations(range(4), size)))


def test_coupled_copies_score_each_token_of_the_response_once():
    mask_BT = masks()
    for seed, pairs in ((3, 1), (4, 2)):
        uniform_B = torch.rand(len(mask_BT), generator=seeded(seed))
        size_B = F.whole_numbers(uniform_B, 0, mask_BT.sum(1))
        copies = F.coupled_copies(
            torch.rand(mask_BT.shape, generator=seeded(seed)), mask_BT, size_B, pairs
        )
        assert torch.equal(copies.hidden_BCT.sum(1), mask_BT.long())
        assert torch.equal(copies.weights_BCT > 0, copies.hidden_BCT)
        length_B = mask_BT.sum(1)
        for b in range(len(mask_BT)):
            for c, count in enumerate((size_B[b], length_B[b] - size_B[b])):
                values = copies.weights_BCT[b, c][copies.hidden_BCT[b, c]]
                if count:
                    expected = (int(length_B[b]) + 1) / (2 * pairs * int(count))
                    assert values.tolist() == pytest.approx([expected] * int(count))


@pytest.mark.parametrize("L", LENGTHS)
def test_the_expectation_over_coupled_masks_is_the_any_order_bound(L):
    logprobs, uniform_BT = table(L), all_orders(L)
    mask_BT = torch.ones_like(uniform_BT, dtype=torch.bool)
    means = [
        estimate(
            F.coupled_copies(uniform_BT, mask_BT, torch.full((len(uniform_BT),), x), 1), logprobs
        ).mean()
        for x in range(L + 1)
    ]
    assert float(sum(means) / (L + 1)) == pytest.approx(any_order(logprobs, L), abs=1e-6)


@pytest.mark.parametrize("part", [0, 1])
def test_each_term_of_a_pair_is_unbiased_by_itself(part):
    L, uniform_BT = 3, all_orders(3)
    logprobs, mask_BT = table(L), torch.ones_like(uniform_BT, dtype=torch.bool)
    total = 0.0
    for x in range(L + 1):
        copies = F.coupled_copies(uniform_BT, mask_BT, torch.full((6,), x), 1)
        single = F.Copies(
            copies.hidden_BCT[:, part : part + 1], 2 * copies.weights_BCT[:, part : part + 1]
        )
        total += float(estimate(single, logprobs).mean()) / (L + 1)
    assert total == pytest.approx(any_order(logprobs, L), abs=1e-6)


@pytest.mark.parametrize("L", LENGTHS)
def test_the_expectation_over_single_masks_is_the_any_order_bound(L):
    logprobs, uniform_BT = table(L), all_orders(L)
    mask_BT = torch.ones_like(uniform_BT, dtype=torch.bool)
    means = [
        estimate(
            F.subset_copies(uniform_BT, mask_BT, torch.full((len(uniform_BT),), size)), logprobs
        ).mean()
        for size in range(1, L + 1)
    ]
    assert float(sum(means) / L) == pytest.approx(any_order(logprobs, L), abs=1e-6)


def test_a_row_without_tokens_has_copies_without_weight():
    nothing_BT, uniform_BT = torch.zeros(1, 3, dtype=torch.bool), torch.rand(1, 3)
    for copies in (
        F.coupled_copies(uniform_BT, nothing_BT, torch.tensor([0]), 1),
        F.subset_copies(uniform_BT, nothing_BT, torch.tensor([1])),
    ):
        assert not copies.hidden_BCT.any()
        assert (copies.weights_BCT == 0).all()


@pytest.mark.parametrize(("parts", "most"), [(1, 5), (3, 4), (4, 6), (8, 3)])
def test_stratified_sizes_are_uniform_and_spread(parts, most):
    """Over a fine grid of the one random number, each size comes as often at each place."""
    cells = 50 * parts * most
    uniform_G = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    numbers_GN = F.stratified(uniform_G, parts)
    gaps_GN = (numbers_GN.sort(1).values - numbers_GN.min(1, keepdim=True).values) * parts
    torch.testing.assert_close(
        gaps_GN, torch.arange(parts, dtype=torch.float64).expand(cells, -1), atol=1e-9, rtol=0
    )
    sizes_GN = F.whole_numbers(numbers_GN, 1, torch.full_like(numbers_GN, most).long())
    for column_G in sizes_GN.T:
        assert column_G.unique(return_counts=True)[1].tolist() == [cells // most] * most


def test_a_number_that_rounds_to_one_gives_the_largest():
    almost = torch.tensor([1.0 - 2**-24, 1.0])
    assert F.whole_numbers(almost, 1, torch.tensor([7, 7])).tolist() == [7, 7]


def test_low_discrepancy_numbers_take_each_part_once():
    B, N = 6, 4
    order_BN = torch.rand(B, N, generator=seeded(0)).argsort(0)
    numbers_BN = F.low_discrepancy(order_BN, torch.rand(B, N, generator=seeded(1)).double())
    assert (numbers_BN * N).floor().sort(1).values.tolist() == [[0, 1, 2, 3]] * B
    assert (numbers_BN.flatten() * B * N).floor().sort().values.tolist() == list(range(B * N))


def test_with_as_many_samples_as_steps_each_step_comes_once():
    last, B = 4, 5
    order_BN = torch.rand(B, last + 1, generator=seeded(2)).argsort(0)
    uniform_BN = F.low_discrepancy(order_BN, torch.rand(B, last + 1, generator=seeded(3)))
    step_BN = F.whole_numbers(uniform_BN, 0, torch.full((B, 1), last))
    assert step_BN.sort(1).values.tolist() == [list(range(last + 1))] * B


def test_the_spread_of_stratified_means_is_smaller():
    B, N, draws = 4, 8, 400
    values_S = torch.arange(20, dtype=torch.float64).square()
    last_B1 = torch.tensor([[19], [12], [7], [3]])
    spread = {}
    for stratified in (True, False):
        g, means = seeded(5), []
        for _ in range(draws):
            uniform_BN = torch.rand(B, N, generator=g)
            if stratified:
                uniform_BN = F.low_discrepancy(torch.rand(B, N, generator=g).argsort(0), uniform_BN)
            means.append(values_S[F.whole_numbers(uniform_BN, 0, last_B1)].mean(1))
        spread[stratified] = torch.stack(means).std(0)
    assert (spread[True] < 0.6 * spread[False]).all()


def test_a_replayed_copy_is_the_row_before_its_step():
    reveal_BT = torch.tensor([[0, 2, 1, 1], [1, 0, 0, NEVER]])
    copies = F.replayed_copies(reveal_BT, torch.tensor([[0, 1], [1, 2]]))
    x, o = True, False
    assert copies.hidden_BCT.tolist() == [
        [[x, x, x, x], [o, x, x, x]],
        [[x, o, o, x], [o, o, o, x]],
    ]
    assert copies.weights_BCT.tolist() == [
        [[1, 0, 0, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [0, 0, 0, 0]],
    ]


def test_steps_are_drawn_by_the_entropy_of_their_tokens():
    entropy_BT = torch.tensor([[1.0, 2.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    reveal_BT = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3]])
    probabilities_BS = F.step_probabilities(entropy_BT, reveal_BT, torch.tensor([1, 2, 2]), 3)
    torch.testing.assert_close(
        probabilities_BS,
        torch.tensor([[0.25, 0.75, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]]),
    )


def test_a_step_without_probability_is_never_drawn():
    probabilities_BS = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform_BN = torch.tensor([[0.0, 0.2499, 0.25, 0.5, 1 - 2**-24, 1.0]])
    assert F.draw_steps(uniform_BN, probabilities_BS).tolist() == [[1, 1, 3, 3, 3, 3]]


def test_probabilities_that_rounding_leaves_short_of_one_draw_no_step_behind_the_last():
    probabilities_BS = torch.full((1, 7), 1 / 7)
    probabilities_BS[0, 6] = 0
    steps = F.draw_steps(torch.tensor([[1 - 2**-24, 1.0]]), probabilities_BS)
    assert steps.max() == 5


@pytest.mark.parametrize("importance", ["uniform", "entropy"])
def test_all_steps_with_equal_weight_are_the_expectation_of_the_estimate(importance):
    """Steps are drawn over a fine grid of numbers; weights of importance undo their probability."""
    loss_S, last, cells = torch.randn(5, generator=seeded(6), dtype=torch.float64), 3, 64 * 4
    exact = loss_S[: last + 1].mean()
    uniform_1N = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells)[None]
    if importance == "uniform":
        estimates = loss_S[F.whole_numbers(uniform_1N, 0, torch.tensor([[last]]))]
    else:
        entropy = torch.tensor([[1.0, 2.0, 4.0, 1.0, 7.0]])
        probabilities_1S = F.step_probabilities(
            entropy, torch.arange(5)[None], torch.tensor([last]), 5
        )
        step_1N = F.draw_steps(uniform_1N, probabilities_1S)
        estimates = loss_S[step_1N] / ((last + 1) * probabilities_1S.double().gather(1, step_1N))
    torch.testing.assert_close(estimates.mean(), exact, atol=1e-6, rtol=0)
