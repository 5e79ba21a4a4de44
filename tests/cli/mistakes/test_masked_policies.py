"""Mistakes with masked language models end in one line."""

from __future__ import annotations

import pytest

from tests.support.mistakes import POLICY, Case, check_message

MASKED = [f"--{POLICY}", "TinyMaskedPolicy"]
ESPO = {
    "more.yaml": "model: {init_args: {objective: {actions: SequenceActions, likelihood: "
    "CoupledElbo, correction: null}}}"
}
SAMPLER = {
    "sampler.yaml": "rollout: {sampler: {class_path: DiffusionSampler, init_args: {block: 1}}}"
}
BOTH = ["-c", "more.yaml", "-c", "sampler.yaml"]

CASES = {
    "a masked policy without a likelihood": Case(
        "`TinyMaskedPolicy` is a masked language model, and `objective.likelihood` is not set: "
        "give `CoupledElbo`, `Elbo` or `Denoising`",
        MASKED,
    ),
    "a likelihood of a causal policy": Case(
        "`objective.likelihood: CoupledElbo` hides tokens of a response, and `TinyPolicy` is a "
        "causal language model: give `likelihood: null`",
        ["-c", "more.yaml"],
        ESPO,
    ),
    "heads of a masked policy": Case(
        "`HeadDiagnostics` measures multi-token heads, which `TinyMaskedPolicy` has not",
        [*BOTH, *MASKED, "--trainer.callbacks+=HeadDiagnostics"],
        ESPO | SAMPLER,
    ),
    "overlaps of supports of a masked policy": Case(
        "`SupportOverlap` asks a causal model for supports from left to right",
        [*BOTH, *MASKED, "--trainer.callbacks+=SupportOverlap"],
        ESPO | SAMPLER,
    ),
    "restarts of a masked policy": Case(
        "`rollout.replay` copies the first tokens of other completions, and `DiffusionSampler` "
        "does not draw from left to right; use `rollout.replay: null`",
        [*BOTH, *MASKED, "--rollout.replay", "PrefixReplay"],
        ESPO | SAMPLER,
    ),
    "a warm-up of heads of a masked policy": Case(
        "`model.policy`: `TinyMaskedPolicy` is a `Policy`, which does not belong here",
        ["-c", "heads.yaml"],
        {
            "heads.yaml": "model: {class_path: HeadWarmup, init_args: {policy: "
            "{class_path: TinyMaskedPolicy, init_args: {hidden_size: 32}}}}"
        },
    ),
    "more copies of a row than can be scored": Case(
        "`CoupledElbo.pairs` must be at most 1,000, got 5000000",
        [*BOTH, *MASKED, "--model.init_args.objective.likelihood.init_args.pairs", "5000000"],
        ESPO | SAMPLER,
    ),
    "a likelihood that is taken away on the command line": Case(
        "`TinyMaskedPolicy` is a masked language model, and `objective.likelihood` is not set",
        [*BOTH, *MASKED, "--model.init_args.objective.likelihood", "null"],
        ESPO | SAMPLER,
    ),
    "a head of a width that does not divide": Case(
        "`TinyMaskedPolicy.hidden_size` must be a multiple of `heads` = 5, got 32",
        [*MASKED, f"--{POLICY}.hidden_size", "32", f"--{POLICY}.heads", "5"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
