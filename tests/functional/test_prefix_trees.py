"""Prefix trees against a walk over a dictionary, and their invariants."""

import pytest
import torch

from lightning_mpo.functional.prefix_tree import prefix_tree
from tests.support.rewards_of_groups import rewards


def trees(seed=2, groups=3, size=6, width=5):
    """Few distinct tokens, so that prefixes are shared; unequal lengths, so that some end where others go on."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (groups * size, width), generator=g)
    lengths = torch.randint(1, width + 1, (groups * size, 1), generator=g)
    return tokens, torch.arange(width) < lengths, rewards(groups * size, seed), size


def loop_tree(tokens, mask, given):
    """One group: compare explicit prefixes."""
    rows = [
        [int(x) for x, m in zip(row, keep, strict=True) if m]
        for row, keep in zip(tokens, mask, strict=True)
    ]
    advantages, weights = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for i, row in enumerate(rows):
        for t in range(len(row)):
            start = [j for j in range(len(rows)) if rows[j][:t] == row[:t]]
            same = [j for j in start if rows[j][: t + 1] == row[: t + 1]]
            nexts = {rows[j][t] if t < len(rows[j]) else None for j in start}
            if len(nexts) > 1:
                advantages[i, t] = given[same].mean() - given[start].mean()
                weights[i, t] = 1 / len(same)
    return advantages, weights


@pytest.mark.parametrize("seed", range(4))
def test_prefix_tree_is_the_definition(seed):
    tokens, mask, given, size = trees(seed)
    advantages, weights = prefix_tree(tokens.where(mask, -7), mask, given, size)
    for start in range(0, len(given), size):
        part = slice(start, start + size)
        expected = loop_tree(tokens[part], mask[part], given[part])
        torch.testing.assert_close(advantages[part], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights[part], expected[1], rtol=1e-10, atol=1e-12)
    assert (weights > 0).any()
    assert (weights[mask] == 0).any()


def test_advantages_telescope_and_cancel_at_every_node():  # docs/algorithms.md 16.5, invariants 4 and 6
    tokens, mask, given, size = trees(3, groups=1)
    full = torch.ones_like(mask)
    advantages, _ = prefix_tree(tokens, full, given, size)
    for i in range(size):
        identical = [j for j in range(size) if torch.equal(tokens[i], tokens[j])]
        assert float(advantages[i].sum()) == pytest.approx(
            float(given[identical].mean() - given.mean()), abs=1e-12
        )
        for t in range(tokens.shape[1]):
            start = [j for j in range(size) if torch.equal(tokens[i, :t], tokens[j, :t])]
            assert abs(float(advantages[start, t].sum())) < 1e-12


def test_extremes_of_prefix_trees():  # docs/algorithms.md 16.5, invariant 7
    given, mask = rewards(4), torch.ones(4, 3, dtype=torch.bool)
    advantages, weights = prefix_tree(torch.tensor([[1, 2, 3]]).expand(4, 3), mask, given, 4)
    assert not advantages.any()
    assert not weights.any()
    distinct = torch.tensor([[1, 5, 5], [2, 5, 5], [3, 5, 5], [4, 5, 5]])
    advantages, weights = prefix_tree(distinct, mask, given, 4)
    torch.testing.assert_close(advantages[:, 0], given - given.mean())
    assert torch.equal(weights, torch.tensor([[1.0, 0.0, 0.0]] * 4).double())
    assert not advantages[:, 1:].any()


def test_order_of_a_group_does_not_matter():  # docs/algorithms.md 16.5, invariant 8
    tokens, mask, given, size = trees(1, groups=1)
    order = [3, 0, 5, 1, 4, 2]
    for one, other in zip(
        prefix_tree(tokens, mask, given, size),
        prefix_tree(tokens[order], mask[order], given[order], size),
        strict=True,
    ):
        torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-15)


def dictionary_tree(tokens, mask, given, valid):
    """One group with gaps and rows that do not count: a dictionary from prefix to the rows that start with it."""
    rows = {}
    for i in [i for i in range(len(given)) if valid[i]]:
        ends = max([t for t in range(mask.shape[1]) if mask[i, t]], default=-1) + 1
        rows[i] = tokens[i, :ends].tolist()
    through, nexts = {}, {}
    for i, row in rows.items():
        for t in range(len(row) + 1):
            prefix = tuple(row[:t])
            through.setdefault(prefix, []).append(i)
            nexts.setdefault(prefix, set()).add(row[t] if t < len(row) else "end")
    advantages, weights = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for i, row in rows.items():
        for t in range(len(row)):
            parent, child = through[tuple(row[:t])], through[tuple(row[: t + 1])]
            if mask[i, t] and len(nexts[tuple(row[:t])]) > 1:
                advantages[i, t] = given[child].mean() - given[parent].mean()
                weights[i, t] = 1 / len(child)
    return advantages, weights


@pytest.mark.parametrize("seed", range(6))
def test_gaps_are_part_of_prefixes_and_rows_that_do_not_count_stand_apart(seed):
    tokens, mask, given, size = trees(seed, width=6)
    g = torch.Generator().manual_seed(seed)
    mask = mask & (torch.rand(mask.shape, generator=g) < 0.8)
    valid = torch.rand(len(given), generator=g) < 0.7
    valid[:size] = torch.arange(size) < 1  # a group with one row that counts, and one with none
    valid[size : 2 * size] = False
    garbage = torch.where(valid, given, torch.nan)
    advantages, weights = prefix_tree(tokens, mask, garbage, size, valid_B=valid)
    for start in range(0, len(given), size):
        part = slice(start, start + size)
        expected = dictionary_tree(tokens[part], mask[part], given[part], valid[part])
        torch.testing.assert_close(advantages[part], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights[part], expected[1], rtol=1e-10, atol=1e-12)
    assert not advantages[~valid].any()
    assert not weights[: 2 * size].any()
    assert weights.any()
    assert not weights[~mask].any()


def test_weights_of_a_tree_sum_to_the_number_of_its_distinct_pairs():
    tokens, mask, given, size = trees(4, groups=1)
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    pairs = {(tuple(row[:t]), row[t]) for row in rows for t in range(len(row))}
    ends = {tuple(row) for row in rows}
    branching = [(p, v) for p, v in pairs if len([1 for q, _ in pairs if q == p]) + (p in ends) > 1]
    weights = prefix_tree(tokens, mask, given, size)[1]
    assert weights.sum().item() == pytest.approx(len(branching))
    assert len(branching) < (weights > 0).sum()


@pytest.mark.parametrize("reward", [0.1, 0.3, 10.1])
@pytest.mark.parametrize("G", [3, 5, 7])
def test_equal_rewards_give_branches_no_credit_at_all(reward, G):
    tokens_BT = torch.randint(0, 3, (G, 6), generator=torch.Generator().manual_seed(G))
    advantages_BT, weights_BT = prefix_tree(
        tokens_BT, torch.ones(G, 6, dtype=torch.bool), torch.full((G,), reward), G
    )
    assert weights_BT.any()
    assert not advantages_BT.any()
