"""The critic's loss against a loop, and where PPO's clip stops it."""

import pytest
import torch

from lightning_mpo.functional.values import explained_variance, value_errors


def table(seed, rows=6, width=5):
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


VALUES, OLD, RETURNS = table(0), table(1), table(2)


def loop(clip):
    """One value at a time, as PPO2 writes it."""
    expected = torch.empty_like(VALUES)
    for i, (value, old, target) in enumerate(
        zip(
            VALUES.flatten().tolist(),
            OLD.flatten().tolist(),
            RETURNS.flatten().tolist(),
            strict=True,
        )
    ):
        free = (value - target) ** 2
        moved = old + min(max(value - old, -clip), clip) if clip is not None else value
        expected.view(-1)[i] = max(free, (moved - target) ** 2) / 2
    return expected


@pytest.mark.parametrize("clip", [None, 0.1, 0.5, 100.0])
def test_errors_are_the_definition(clip):
    torch.testing.assert_close(
        value_errors(VALUES, OLD, RETURNS, clip=clip), loop(clip), rtol=1e-12, atol=0
    )


def test_a_wide_clip_is_none_and_a_narrow_one_only_adds():
    free, wide, narrow = (
        value_errors(VALUES, OLD, RETURNS, clip=clip) for clip in (None, 100.0, 0.2)
    )
    torch.testing.assert_close(wide, free, rtol=1e-12, atol=0)
    assert (narrow >= free).all()
    assert (narrow > free).any()
    assert torch.equal(value_errors(VALUES, VALUES, RETURNS, clip=0.2), free)  # at rollout weights


@pytest.mark.parametrize(
    ("value", "gradient", "why"),
    [
        (0.1, -0.9, "inside the clip: V - R"),
        (
            0.5,
            0.0,
            "moved beyond the clip towards the return: the clipped error is larger and does not move",
        ),
        (
            -0.5,
            -1.5,
            "moved beyond the clip away from the return: the free error is larger and pulls it back",
        ),
        (2.5, 1.5, "beyond the return, where the free error is the larger one again"),
    ],
)
def test_the_clip_stops_values_on_their_way_to_the_return(value, gradient, why):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    value_errors(values, zero, zero + 1, clip=0.2).sum().backward()
    assert values.grad.item() == pytest.approx(gradient), why


def test_messages_name_the_argument():
    for clip in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"`clip` must be above 0, got {clip}"):
            value_errors(VALUES, OLD, RETURNS, clip=clip)
    with pytest.raises(
        ValueError,
        match=r"`returns_BT` must have shape \[B=6, T=5\] \(as `values_BT`\), got \[5, 5\]",
    ):
        value_errors(VALUES, OLD, RETURNS[1:])


def test_explained_variance_is_the_definition():
    def measure(values):
        parts = [(RETURNS - values).square(), values, RETURNS, RETURNS.square()]
        return explained_variance(*(part.mean().item() for part in parts))

    expected = 1 - (RETURNS - VALUES).var(correction=0) / RETURNS.var(correction=0)
    assert measure(VALUES) == pytest.approx(expected.item(), rel=1e-10)
    assert measure(RETURNS) == pytest.approx(1)
    assert measure(RETURNS + 3) == pytest.approx(1), "a constant offset leaves no variance"
    assert measure(torch.full_like(RETURNS, 7.0)) == pytest.approx(0, abs=1e-12)
    assert explained_variance(0.5, 1.0, 2.0, 4.0) == 0, "returns that do not vary"
