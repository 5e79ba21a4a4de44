"""Mistakes in the supervised stage of a masked policy end in one line."""

from __future__ import annotations

import pytest

from tests.support.mistakes import OVERLAY, Case, check_message

MASKED = "{class_path: TinyMaskedPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2, max_length: 20}}"
CAUSAL = "{class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2}}"


def stage(message: str, policy: str, likelihood: str) -> Case:
    """Return a mistake in a supervised stage with this policy and likelihood."""
    options = f"{{policy: {policy}, likelihood: {likelihood}}}"
    text = f"model: {{class_path: SupervisedWarmup, init_args: {options}}}"
    return Case(message, OVERLAY, {"o.yaml": text})


CASES = {
    "a masked policy without a likelihood": stage(
        "`TinyMaskedPolicy` is a masked language model, and `SupervisedWarmup.likelihood` is not "
        "set: give `likelihood: {canvas: N}`",
        MASKED,
        "null",
    ),
    "a likelihood for a causal policy": stage(
        "`TinyPolicy` is a causal language model…give `likelihood: null`", CAUSAL, "{canvas: 12}"
    ),
    "an empty canvas": stage("`likelihood.canvas` must be at least 1", MASKED, "{canvas: 0}"),
    "a canvas shorter than a demonstration": stage(
        "the solution of …tokens with the end token, more than the canvas of 11: raise "
        "`likelihood.canvas`",
        MASKED,
        "{canvas: 11}",
    ),
    "a canvas beyond the positions": stage(
        "`likelihood.canvas` is 18, together more than the model's 20 positions: set "
        "`likelihood.canvas` to at most 16",
        MASKED,
        "{canvas: 18}",
    ),
    "weights without a bound": stage(
        "`likelihood.least` must be in (0, 1], got 0.0", MASKED, "{canvas: 12, least: 0.0}"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message(name, tmp_path):
    check_message(CASES[name], tmp_path)
