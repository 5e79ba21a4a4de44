"""Advantages against plain loops, and the invariants of groups, critics and prefix trees."""

import statistics

import pytest
import torch

from lightning_mpo.functional.advantages import (
    generalized_advantages,
    group_relative,
    leave_one_out,
    moments,
    prefix_tree,
    whiten,
)


def rewards(rows=12, seed=0):
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_group_relative_is_the_definition(scale, group_size):
    given = rewards()
    result = group_relative(given, group_size, scale=scale).tolist()
    for start in range(0, 12, group_size):
        group = given[start : start + group_size].tolist()
        mean, std = statistics.mean(group), statistics.stdev(group)
        for i, reward in enumerate(group):
            expected = (reward - mean) / (std + 1e-4) if scale == "std" else reward - mean
            assert result[start + i] == pytest.approx(expected, rel=1e-10)


def test_leave_one_out_is_the_definition():
    given = rewards()
    result = leave_one_out(given, 4).tolist()
    for i, reward in enumerate(given.tolist()):
        others = [given[j].item() for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        assert result[i] == pytest.approx(reward - statistics.mean(others), rel=1e-10)


def test_group_identities():  # docs/algorithms.md 16.4, invariant 1
    given = rewards()
    centred = group_relative(given, 4, scale="none")
    for advantages in (centred, group_relative(given, 4), leave_one_out(given, 4)):
        assert advantages.view(-1, 4).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(leave_one_out(given, 4), 4 / 3 * centred, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [group_relative, leave_one_out])
def test_equal_rewards_give_exactly_zero(method):
    for value in (0.1, 1 / 3, -7.7, 1e8):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(
                method(torch.full((14,), value, dtype=dtype), 7), torch.zeros(14, dtype=dtype)
            )


@pytest.mark.parametrize(
    "method", [group_relative, leave_one_out, lambda *a, **k: group_relative(*a, scale="none", **k)]
)
def test_rows_that_are_not_valid_count_nowhere(method):
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]).bool()
    given = rewards()
    given[~valid] = torch.nan
    result = method(given, 4, valid_B=valid)
    assert torch.equal(result[:4][valid[:4]], method(given[:4][valid[:4]], 3))
    assert torch.equal(result[~valid], torch.zeros(int((~valid).sum()), dtype=torch.float64))
    assert torch.equal(result[4:], torch.zeros(8, dtype=torch.float64))  # one valid row, and none
    alone = method(rewards(), 4, valid_B=torch.ones(12, dtype=torch.bool))
    assert torch.equal(alone, method(rewards(), 4))


def test_groups_do_not_see_each_other():
    given = rewards()
    changed = given.clone()
    changed[4:8] += 100
    for method in (group_relative, leave_one_out):
        before, after = method(given, 4), method(changed, 4)
        assert torch.equal(before[:4], after[:4])
        assert torch.equal(before[8:], after[8:])


def test_advantages_are_data():
    given = rewards().requires_grad_()
    assert not group_relative(given, 4).requires_grad
    assert not leave_one_out(given, 4).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: group_relative(rewards(), 1),
            ValueError,
            "`group_size` must be at least 2 .*, got 1",
        ),
        (
            lambda: leave_one_out(rewards(), 5),
            ValueError,
            "`rewards_B` must hold whole groups .* = 5, got 12 rewards",
        ),
        (
            lambda: group_relative(rewards(), 4, scale="x"),
            ValueError,
            "`scale` must be 'std' or 'none', got 'x'",
        ),
        (
            lambda: group_relative(rewards().long(), 4),
            TypeError,
            "`rewards_B` must be floating point",
        ),
        (
            lambda: group_relative(rewards(), 4, valid_B=torch.ones(11).bool()),
            ValueError,
            r"`valid_B` must have shape \[B=12\] \(as `rewards_B`\), got \[11\]",
        ),
    ],
)
def test_messages_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- critic ----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()


def critic(seed=1):
    g = torch.Generator().manual_seed(seed)
    r, v = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return r.where(MASK, torch.nan), v.where(MASK, torch.nan)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0), (0.0, 0.5)])
def test_generalized_advantages_are_the_definition(gamma, lam):
    r, v = critic()
    advantages, returns = generalized_advantages(r, v, MASK, gamma=gamma, lam=lam)
    for b in range(4):
        steps = [t for t in range(5) if MASK[b, t]]
        deltas = []
        for i, t in enumerate(steps):
            after = float(v[b, steps[i + 1]]) if i + 1 < len(steps) else 0.0
            deltas.append(float(r[b, t]) + gamma * after - float(v[b, t]))
        for i, t in enumerate(steps):
            expected = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:]))
            assert float(advantages[b, t]) == pytest.approx(expected, rel=1e-10)
            assert float(returns[b, t]) == pytest.approx(expected + float(v[b, t]), rel=1e-10)
        assert (advantages[b][~MASK[b]] == 0).all()
        assert (returns[b][~MASK[b]] == 0).all()


def test_limits_of_the_estimator():  # docs/algorithms.md 16.4, invariant 6
    r, v = critic()
    to_go = r[:1].flip(1).cumsum(1).flip(1)
    advantages, returns = generalized_advantages(r[:1], v[:1], MASK[:1], gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, to_go - v[:1])
    torch.testing.assert_close(returns, to_go)
    for lam in (0.0, 0.5, 1.0):  # a perfect critic leaves nothing to learn
        perfect, _ = generalized_advantages(r[:1], to_go, MASK[:1], gamma=1.0, lam=lam)
        assert perfect.abs().max() < 1e-12


def test_padding_changes_no_advantage_and_values_get_no_gradient():
    r, v = critic()
    before = generalized_advantages(r, v, MASK, gamma=0.9, lam=0.8)
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (r, v, MASK)]
    after = generalized_advantages(wide[0], wide[1].requires_grad_(), wide[2], gamma=0.9, lam=0.8)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other[:, :5])
        assert not other.requires_grad
    with pytest.raises(ValueError, match=r"`gamma` must be in \[0, 1\], got 1.1"):
        generalized_advantages(r, v, MASK, gamma=1.1, lam=1.0)


# ---- whitening -------------------------------------------------------------------------------------------------------


def test_whitening_is_the_definition():
    values, _ = critic()
    counted = values[MASK].tolist()
    mean, variance = statistics.mean(counted), statistics.variance(counted)
    white = whiten(values, MASK, moments(values, MASK))
    expected = [(x - mean) / (variance + 1e-8) ** 0.5 for x in counted]
    torch.testing.assert_close(
        white[MASK], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert not white[~MASK].any()
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].std().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("rows", [[[0], [1, 2, 3]], [[3], [0, 2], [1]]])
def test_ranks_add_their_moments_and_whiten_as_one(rows):
    values, _ = critic()
    whole = whiten(values, MASK, moments(values, MASK))
    sums = sum(moments(values[part], MASK[part]) for part in rows)
    for part in rows:
        torch.testing.assert_close(
            whiten(values[part], MASK[part], sums), whole[part], rtol=1e-12, atol=1e-15
        )
    alone = whiten(values[[0]], MASK[[0]], moments(values[[0]], MASK[[0]]))
    assert (alone - whole[[0]]).abs().max() > 0.1, "moments of one rank would have passed"


def test_whitening_knows_no_shift_and_no_scale_and_survives_a_large_mean():
    values, _ = critic()
    white = whiten(values, MASK, moments(values, MASK))
    other = 100 * values + 1e4
    torch.testing.assert_close(
        whiten(other, MASK, moments(other, MASK)), white, rtol=1e-6, atol=1e-6
    )
    single = (values + 1e3).float()  # the square of the mean is 10^6 times the variance
    torch.testing.assert_close(
        whiten(single, MASK, moments(single, MASK)).double(), white, rtol=1e-3, atol=1e-3
    )


def test_what_does_not_vary_is_whitened_to_nothing():
    for values, mask in (
        (torch.full((4, 5), 0.3), MASK),
        (torch.ones(1, 1), torch.ones(1, 1).bool()),
        (torch.full((4, 5), torch.nan), torch.zeros(4, 5).bool()),
    ):
        assert whiten(values, mask, moments(values, mask)).abs().max() < 1e-3


# ---- prefix tree -----------------------------------------------------------------------------------------------------


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
