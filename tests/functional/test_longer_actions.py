"""Log-ratios of segments and of sequences against plain loops."""

import pytest
import torch

from lightning_mpo.functional.actions import segment_log_ratios, sequence_log_ratios
from tests.support.ratios import MASKS, B, T, ratios


def loop_segments(row, mask, segments, mean):
    values, starts, counts = [0.0] * len(row), [False] * len(row), [0] * len(row)
    for name in {s for s, m in zip(segments, mask, strict=True) if m}:
        members = [t for t in range(len(row)) if mask[t] and segments[t] == name]
        total = sum(row[t] for t in members)
        values[members[0]] = total / len(members) if mean else total
        starts[members[0]], counts[members[0]] = True, len(members)
    return values, starts, counts


@pytest.mark.parametrize("mean", [True, False])
def test_segments_are_the_definition(mean):
    g = torch.Generator().manual_seed(3)
    given = ratios(B, T)
    segments = torch.randint(0, 2, (B, T), generator=g).cumsum(1).where(MASKS, -99)
    segments[4] = torch.tensor(
        [0, 0, 3, 3, 0, 9, 9, 9, 3, 0]
    )  # ids need be neither dense nor contiguous
    segments[segments >= T] = 0
    values, starts, tokens = segment_log_ratios(
        given.where(MASKS, torch.nan), MASKS, segments, mean=mean
    )
    for b in range(B):
        expected = loop_segments(given[b].tolist(), MASKS[b].tolist(), segments[b].tolist(), mean)
        assert values[b].tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-15)
        assert starts[b].tolist() == expected[1]
        assert tokens[b].tolist() == expected[2]
    assert torch.equal(tokens.sum(1), MASKS.sum(1).double())


@pytest.mark.parametrize("mean", [True, False])
def test_a_sequence_is_the_definition(mean):
    given = ratios(B, T)
    values, starts, tokens = sequence_log_ratios(given, MASKS, mean=mean)
    for b in range(B):
        members = [t for t in range(T) if MASKS[b, t]]
        assert int(starts[b].sum()) == bool(members)
        if members:
            total = sum(float(given[b, t]) for t in members)
            assert float(values[b, members[0]]) == pytest.approx(
                total / len(members) if mean else total, rel=1e-12
            )
            assert tokens[b].tolist() == [len(members) if t == members[0] else 0 for t in range(T)]


def test_extremes_of_segments_are_tokens_and_sequences():
    given = ratios(B, T)
    each = torch.arange(T).expand(B, T)
    values, starts, tokens = segment_log_ratios(given, MASKS, each)
    assert torch.equal(values, given * MASKS)
    assert torch.equal(starts, MASKS)
    assert torch.equal(tokens, MASKS.double())
    for one, other in zip(
        segment_log_ratios(given, MASKS, torch.full((B, T), 4)),
        sequence_log_ratios(given, MASKS),
        strict=True,
    ):
        assert torch.equal(one, other)
