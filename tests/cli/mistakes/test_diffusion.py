"""Mistakes in the sampler of masked policies end in one line."""

from __future__ import annotations

import pytest

from tests.support.mistakes import OVERLAY, Case, check_message

SAMPLER = "--rollout.sampler"


def masked(sampler: str = "{block: 3}", rest: str = "") -> dict[str, str]:
    """Overlay: a masked policy, options of its sampler, and further sections."""
    policy = "{class_path: TinyMaskedPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2}}"
    return {
        "o.yaml": f"""\
model: {{init_args: {{policy: {policy}, objective: {{likelihood: Denoising{rest}}}}}}}
rollout: {{sampler: {{class_path: DiffusionSampler, init_args: {sampler}}}}}
"""
    }


CASES = {
    "a canvas that blocks do not fill": Case(
        "`rollout.max_new_tokens` (6) must be a multiple of `DiffusionSampler.block` (4), as blocks "
        "fill the canvas: use 4 or 8, or another block",
        OVERLAY,
        masked("{block: 4}"),
    ),
    "steps that do not fill a block": Case(
        "`DiffusionSampler.tokens_per_step` must divide `block` (3), got 2",
        OVERLAY,
        masked("{block: 3, tokens_per_step: 2}"),
    ),
    "a block of no tokens": Case(
        "`DiffusionSampler.block` must be at least 1, got 0", OVERLAY, masked("{block: 0}")
    ),
    "steps of no tokens": Case(
        "`DiffusionSampler.tokens_per_step` must be at least 1, got 0",
        OVERLAY,
        masked("{block: 3, tokens_per_step: 0}"),
    ),
    "batches of no rows": Case(
        "`DiffusionSampler.batch_size` must be at least 1, got 0",
        OVERLAY,
        masked("{block: 3, batch_size: 0}"),
    ),
    "another rule of remasking": Case(
        "`rollout.sampler.remasking`: must be one of 'low_confidence', 'random', 'entropy'",
        OVERLAY,
        masked("{block: 3, remasking: confidence}"),
    ),
    "no block": Case("block", OVERLAY, masked("{}")),
    "a diffusion sampler of a causal policy": Case(
        "`DiffusionSampler` reveals the tokens of a masked language model, and TinyPolicy is a "
        "causal one: use `rollout.sampler: null`",
        [SAMPLER, "DiffusionSampler", f"{SAMPLER}.block", "3"],
    ),
    "the sampler of causal policies": Case(
        "`LocalSampler` (`rollout.sampler: null`) decodes a causal model from left to right, and "
        "TinyMaskedPolicy reveals tokens in any order: use `rollout.sampler: {class_path: "
        "DiffusionSampler",
        [*OVERLAY, SAMPLER, "null"],
        masked(),
    ),
    "restarts of a masked policy": Case(
        "`rollout.replay` copies the first tokens of other completions, and `DiffusionSampler` "
        "does not draw from left to right",
        [*OVERLAY, "--rollout.replay", "PrefixReplay"],
        masked(),
    ),
    "a support that needs MASK": Case(
        "`objective.support` TopK keeps 19 ids of a step, and 18 of 20 can be drawn",
        OVERLAY,
        masked(rest=", support: {class_path: TopK, init_args: {k: 19}}"),
    ),
    # --- the plan refuses the same
    "a plan of a canvas that blocks do not fill": Case(
        "`rollout.max_new_tokens` (6) must be a multiple of `DiffusionSampler.block` (4)",
        OVERLAY,
        masked("{block: 4}"),
        verb="plan",
    ),
    "a plan with the sampler of causal policies": Case(
        "`LocalSampler` (`rollout.sampler: null`) decodes a causal model from left to right",
        [*OVERLAY, SAMPLER, "null"],
        masked(),
        verb="plan",
    ),
    "a plan of a canvas beyond the positions": Case(
        "`rollout.max_new_tokens` is 300, together more than the model's 256 positions: set "
        "`rollout.max_new_tokens` to at most",
        [*OVERLAY, "--rollout.max_new_tokens", "300"],
        masked(),
        verb="plan",
    ),
    "a plan of responses beyond the positions of a causal model": Case(
        "`rollout.max_new_tokens` is 300, together more than the model's 256 positions: set "
        "`rollout.max_new_tokens` to at most",
        ["--rollout.max_new_tokens", "300"],
        verb="plan",
    ),
    "a plan of a prefix that is copied": Case(
        "`rollout.replay` copies the first tokens of other completions, and `DiffusionSampler` "
        "does not draw from left to right",
        [*OVERLAY, "--rollout.replay", "PrefixReplay"],
        masked(),
        verb="plan",
    ),
    "a plan of a precision": Case(
        "`trainer.precision: bf16-true` trains half-precision",
        ["--trainer.precision", "bf16-true"],
        verb="plan",
    ),
    "a plan of a support that needs MASK": Case(
        "`objective.support` TopK keeps 19 ids of a step, and 18 of 20 can be drawn",
        OVERLAY,
        masked(rest=", support: {class_path: TopK, init_args: {k: 19}}"),
        verb="plan",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(tmp_path, name):
    check_message(CASES[name], tmp_path)
