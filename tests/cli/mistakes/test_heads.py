"""Mistakes in blocks, multi-token heads and stages before the run end in one line."""

from __future__ import annotations

import io

import pytest
import torch

from tests.support.mistakes import OVERLAY, Case, check_message

HEADS = "{mtp: {class_path: ParallelHeads, init_args: {offsets: 2}}, checkpoint: heads.ckpt}"
MTP = "{length: 3, source: mtp}"


def blocks(block: str, policy: str = "{}") -> dict[str, str]:
    """Overlay: blocks with these options, and a policy with these."""
    actions = f"{{class_path: BlockActions, init_args: {block}}}"
    return {
        "o.yaml": f"model: {{init_args: {{policy: {{init_args: {policy}}}, objective: {{actions: {actions}}}}}}}"
    }


def stage(name: str, options: str) -> dict[str, str]:
    """Overlay: a stage before reinforcement learning, in place of the model."""
    policy = "{class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2, mtp: ParallelHeads}}"
    return {"o.yaml": f"model: {{class_path: {name}, init_args: {{policy: {policy}, {options}}}}}"}


def heads_checkpoint(**description: object) -> bytes:
    """A checkpoint that says which multi-token heads it holds."""
    own = {
        "family": "parallel",
        "offsets": 2,
        "own_unembedding": False,
        "trunk": "llama",
        "hidden_size": 32,
        "vocabulary": 19,
    }
    file = io.BytesIO()
    torch.save({"state_dict": {}, "mtp": own | description}, file)
    return file.getvalue()


CASES = {
    # --- blocks and their heads
    "block weights that do not sum to 1": Case(
        "the weights of `BlockActions` must sum to 1, got 1.5; set `ratio: joint`",
        OVERLAY,
        blocks(
            "{length: 2, weights: {class_path: ExplicitWeights, init_args: {values: [1.0, 0.5]}}}"
        ),
    ),
    "a block of no tokens": Case(
        "`BlockActions.length` must be at least 1, got 0", OVERLAY, blocks("{length: 0}")
    ),
    "heads beyond the longest response": Case(
        "the objective uses multi-token heads up to offset 2, a block of 3 tokens, and "
        "`rollout.max_new_tokens` is 2: raise it, or set `objective.actions.length` to at most 2",
        [*OVERLAY, "--rollout.max_new_tokens", "2"],
        blocks(MTP, "{mtp: {class_path: ParallelHeads, init_args: {offsets: 2}}}"),
    ),
    "a policy loss of heads beyond the longest response": Case(
        "`rollout.max_new_tokens` is 2: raise it, or set `HeadPolicyLoss.offsets` to at most 1",
        [*OVERLAY, "--rollout.max_new_tokens", "2"],
        {"o.yaml": "model: {init_args: {objective: {terms: [HeadPolicyLoss]}}}"},
    ),
    "blocks over heads that are not there": Case(
        "blocks of 3 tokens with `source: mtp`, or `HeadPolicyLoss` with `offsets: 2`, need 2 future offsets, "
        "but the policy has none; give `policy.mtp`",
        OVERLAY,
        blocks(MTP),
    ),
    "a policy loss of heads that are not there": Case(
        "or `HeadPolicyLoss` with `offsets: 2`, need 2 future offsets, but the policy has none; give `policy.mtp`",
        OVERLAY,
        {"o.yaml": "model: {init_args: {objective: {terms: [HeadPolicyLoss]}}}"},
    ),
    "a policy loss of heads that are actions": Case(
        "`HeadPolicyLoss` gives multi-token heads a loss of their own, and `BlockActions` has them in its ratios",
        OVERLAY,
        {
            "o.yaml": "model: {init_args: {objective: {terms: [HeadPolicyLoss], "
            f"actions: {{class_path: BlockActions, init_args: {MTP}}}}}}}}}"
        },
    ),
    "a policy loss of no heads": Case(
        "`HeadPolicyLoss.offsets` must be at least 1, got 0",
        OVERLAY,
        {
            "o.yaml": "model: {init_args: {objective: {terms: "
            "[{class_path: HeadPolicyLoss, init_args: {offsets: 0}}]}}}"
        },
    ),
    "more offsets than heads": Case(
        "need 4 future offsets, but `policy.mtp` has 2",
        OVERLAY,
        blocks("{length: 5, source: mtp}", HEADS),
    ),
    "heads of another family": Case(
        "'heads.ckpt' holds multi-token heads with family 'medusa', `policy.mtp` has 'parallel'",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(family="medusa")},
    ),
    "heads of another trunk": Case(
        "'heads.ckpt' holds multi-token heads with trunk 'qwen2', `policy.mtp` has 'llama'",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(trunk="qwen2")},
    ),
    "heads of another width": Case(
        "with hidden_size 64, `policy.mtp` has 32",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(hidden_size=64)},
    ),
    # --- their diagnostics
    **{
        f"diagnostics of heads: {options}": Case(
            said,
            [*OVERLAY, "--trainer.callbacks+=HeadDiagnostics", *options.split()],
            blocks(MTP if "every" in options else "{length: 3}", HEADS),
        )
        for options, said in {
            "--trainer.callbacks.every=0": "`HeadDiagnostics.every` must be at least 1, got 0",
            "--trainer.callbacks.rows=4": "`objective.actions: BlockActions` uses none; use `BlockActions` with "
            "`source: mtp` and heads (-c mpo -c mtp)",
        }.items()
    },
    # --- stages before
    **{
        f"warm-up of heads: {options}": Case(
            said, OVERLAY, stage("HeadWarmup", options), without="model"
        )
        for options, said in {
            "pool: {prompts: 0}": "`SamplePool.prompts` must be at least 1, got 0",
            "pool: {completions: 0}": "`SamplePool.completions` must be at least 1, got 0",
            "pool: {max_new_tokens: 0}": "`SamplePool.max_new_tokens` must be at least 1, got 0",
            "pool: {passes: 0}": "`SamplePool.passes` must be at least 1, got 0",
            "batches_per_epoch: 0": "`HeadWarmup.batches_per_epoch` must be at least 1, got 0",
            "temperature: 0.0": "`HeadWarmup.temperature` must be positive, got 0.0",
            "temperature: .nan": "`model.temperature` is .nan, which is not a number",
            "pool: {prompts: 3, completions: 1, passes: 2}": "`HeadWarmup.pool.passes` (2) must divide the 3 "
            "samples of a pool on each process (3 prompts x 1 completions)",
            "solutions: true, pool: {prompts: 2, completions: 4, passes: 8}": "`HeadWarmup.pool.passes` (8) must divide "
            "the 2 samples of a pool on each process (2 prompts x one solution each)",
        }.items()
    },
    "micro-batches of no rows": Case(
        "`SupervisedWarmup.batch_size` must be at least 1, got 0",
        OVERLAY,
        stage("SupervisedWarmup", "batch_size: 0"),
        without="model",
    ),
    "epochs of no micro-batches": Case(
        "`SupervisedWarmup.batches_per_epoch` must be at least 1, got 0",
        OVERLAY,
        stage("SupervisedWarmup", "batches_per_epoch: 0"),
        without="model",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
