"""Advantages against plain loops, and the invariants of groups and critics."""

import statistics

import pytest
import torch

from lightning_mpo.functional.advantages import (
    generalized_advantages,
    group_relative,
    leave_one_out,
    moments,
    whiten,
)
from tests.support.rewards_of_groups import rewards

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


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.5), (0.9, 0.95), (0.99, 0.0)])
@pytest.mark.parametrize("length", [2, 3, 7])
def test_an_action_of_several_tokens_sums_their_rewards(gamma, lam, length):
    r, v = critic()
    advantages, returns = generalized_advantages(r, v, MASK, gamma=gamma, lam=lam, length=length)
    for b in range(4):
        tokens = [t for t in range(5) if MASK[b, t]]
        expected = dict.fromkeys(range(len(tokens), len(tokens) + length), 0.0)
        for i in reversed(range(len(tokens))):
            block = tokens[i : i + length]
            behind = float(v[b, tokens[i + length]]) if i + length < len(tokens) else 0.0
            delta = sum(gamma**n * float(r[b, t]) for n, t in enumerate(block))
            delta += gamma**length * behind - float(v[b, tokens[i]])
            expected[i] = delta + gamma**length * lam * expected[i + length]
            assert float(advantages[b, tokens[i]]) == pytest.approx(expected[i], rel=1e-10)
        assert (advantages[b][~MASK[b]] == 0).all()
        assert torch.equal(returns[b][~MASK[b]], advantages[b][~MASK[b]])


def test_at_lambda_1_the_length_of_an_action_changes_nothing():
    r, v = critic()
    one, _ = generalized_advantages(r, v, MASK, gamma=0.9, lam=1.0)
    for length in (2, 3, 7):
        other, _ = generalized_advantages(r, v, MASK, gamma=0.9, lam=1.0, length=length)
        torch.testing.assert_close(other, one)


def test_noise_that_sums_to_0_within_actions_does_not_reach_their_first_tokens():
    g = torch.Generator().manual_seed(0)
    r, v = (torch.randn(2, 9, generator=g, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    noisy = r + (noise - noise.mean(-1, keepdim=True)).flatten(1)
    mask = torch.ones(2, 9, dtype=torch.bool)

    def first_tokens(rewards, length):
        given = {"gamma": 1.0, "lam": 0.5, "length": length}
        return generalized_advantages(rewards, v, mask, **given)[0][:, ::3]

    torch.testing.assert_close(first_tokens(noisy, 3), first_tokens(r, 3))
    assert (first_tokens(noisy, 1) - first_tokens(r, 1)).abs().max() > 0.1
    with pytest.raises(ValueError, match="`length` must be at least 1, got 0"):
        generalized_advantages(r, v, mask, gamma=1.0, lam=1.0, length=0)


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
