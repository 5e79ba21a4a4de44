"""Mistakes in the axes of an objective and in the batch arithmetic end in one line."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.segmenters import Segmenter
from tests.support.mistakes import OBJECTIVE, OVERLAY, POLICY, Case, axis, check_message


class Jumps(Segmenter):
    def segment(self, rollout, entropy_BT, texts):
        return (torch.arange(rollout.response_mask_BT.shape[1]) % 2).expand(
            rollout.response_mask_BT.shape
        )


def segments(segmenter: str) -> str:
    options = f"{{class_path: SegmentActions, init_args: {{segmenter: {segmenter}}}}}"
    return f"model: {{init_args: {{objective: {{actions: {options}}}}}}}"


CASES = {
    # --- algorithm
    "K over the vocabulary": Case(
        "`TopK.k` must be at most the vocabulary size 19, got 64",
        [f"{OBJECTIVE}.support", "TopK", f"{OBJECTIVE}.support.k", "64"],
    ),
    "K of nothing": Case(
        "`TopK.k` must be at least 1, got 0",
        [f"{OBJECTIVE}.support", "TopK", f"{OBJECTIVE}.support.k", "0"],
    ),
    "k1 in the loss": Case(
        "`KLPenalty` with estimator k1 in the loss",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {terms: ["
            "{class_path: KLPenalty, init_args: {controller: ConstantCoefficient, estimator: k1, place: loss}}]}}}"
        },
    ),
    "a clip of null": Case(
        "`model.objective.surrogate.low`: must be float, got null",
        OVERLAY,
        axis("surrogate: {class_path: PositionClip, init_args: {low: null}}"),
    ),
    "one completion": Case(
        "`rollout.completions` must be at least 2, got 1", ["--rollout.completions", "1"]
    ),
    "mini-batches that do not divide": Case(
        "`rollout.minibatches` (3) must divide the 4 sequences", ["--rollout.minibatches", "3"]
    ),
    "too many micro-batches": Case(
        "`trainer.accumulate_grad_batches` = 8", ["--trainer.accumulate_grad_batches", "8"]
    ),
    "a limit within a rollout": Case(
        "`trainer.limit_train_batches` (3) must be a multiple",
        ["--trainer.limit_train_batches", "3", "--rollout.minibatches", "2"],
    ),
    "no prompts": Case("`rollout.prompts` must be at least 1", ["--rollout.prompts", "0"]),
    "no new tokens": Case(
        "`rollout.max_new_tokens` must be at least 1", ["--rollout.max_new_tokens", "0"]
    ),
    "no completions of validation prompts": Case(
        "`rollout.validation_completions` must be at least 1, got 0",
        ["--rollout.validation_completions", "0"],
    ),
    "a k above the completions": Case(
        "`rollout.validation_ks` must hold numbers from 1 to 1, the completions of each problem, "
        "got 8",
        ["--rollout.validation_ks", "[1, 8]"],
    ),
    "a temperature by which logits overflow": Case(
        "`model.temperature` must be at least 1e-06, got 1e-30", ["--model.temperature", "1e-30"]
    ),
    "a temperature of zero": Case(
        "`model.temperature` must be positive", ["--model.temperature", "0"]
    ),
    "a clip below zero": Case(
        "`ClippedRatio.low` must be in [0, 1), got -0.1", [f"{OBJECTIVE}.surrogate.low", "-0.1"]
    ),
    "half-precision weights": Case("`bf16-mixed`", ["--trainer.precision", "bf16-true"]),
    # --- masked language models
    "an ELBO of single tokens": Case(
        "`CoupledElbo` estimates the log-prob of whole responses, and `TokenActions` takes those of "
        "single tokens; use `actions: SequenceActions`",
        OVERLAY,
        axis("likelihood: CoupledElbo"),
    ),
    "no masks of an ELBO": Case(
        "`Elbo.samples` must be at least 1, got 0",
        OVERLAY,
        axis("likelihood: {class_path: Elbo, init_args: {samples: 0}}, actions: SequenceActions"),
    ),
    "no steps of a sampler": Case(
        "`Denoising.steps` must be at least 1, got 0",
        OVERLAY,
        axis("likelihood: {class_path: Denoising, init_args: {steps: 0}}"),
    ),
    "a share above all": Case(
        "`CoupledTokens.most` must be in (0, 1), got 1.5",
        OVERLAY,
        axis("likelihood: {class_path: CoupledTokens, init_args: {most: 1.5}}"),
    ),
    "a divergence of single tokens over an ELBO": Case(
        "`KLPenalty.level: token` compares single tokens, and `CoupledElbo` estimates the log-prob "
        "of whole responses; use `level: sequence` and `estimator: k2`",
        OVERLAY,
        axis(
            "likelihood: CoupledElbo, actions: SequenceActions, "
            "terms: [{class_path: KLPenalty, init_args: {controller: ConstantCoefficient}}]"
        ),
    ),
    # --- tokens that learn
    "a sample that cannot be unbiased": Case(
        "`SampledTokens.unbiased` needs `cap: null`",
        OVERLAY,
        axis("selection: {class_path: SampledTokens, init_args: {unbiased: true}}"),
    ),
    "weighted tokens over sequences": Case(
        "`SampledTokens` weighs single tokens, which has no meaning over `SequenceActions`",
        OVERLAY,
        axis(
            "actions: SequenceActions, selection: {class_path: SampledTokens, init_args: {cap: null, unbiased: true}}"
        ),
    ),
    "a prefix tree over chosen tokens": Case(
        "`PrefixTree` chooses its tokens itself; use `selection: AllTokens`, not `HighEntropyTokens`",
        OVERLAY,
        axis("advantage: PrefixTree, selection: HighEntropyTokens"),
    ),
    "a weight penalty of zero": Case(
        "`WeightPenalty.coef` must be positive, got 0",
        OVERLAY,
        axis("terms: [{class_path: WeightPenalty, init_args: {coef: 0}}]"),
    ),
    "copies that an advantage would count": Case(
        "`PrefixReplay` copies the first tokens of other completions, which `GroupRelative` would count again",
        ["--rollout.replay", "PrefixReplay"],
    ),
    "branches of completions that do not count": Case(
        "`rollout.mask_truncated` takes completions away that `PrefixTree` counted at its branches",
        [*OVERLAY, "--rollout.mask_truncated", "true"],
        axis("advantage: PrefixTree"),
    ),
    "a replay of everything": Case(
        "`PrefixReplay.share` must be in (0, 1), got 1.0",
        OVERLAY,
        {"o.yaml": "rollout: {replay: {class_path: PrefixReplay, init_args: {share: 1.0}}}"},
    ),
    "two loss terms of a class": Case(
        "`objective.terms` has two terms `EntropyBonus`; give one",
        OVERLAY,
        axis("terms: [EntropyBonus, EntropyBonus]"),
    ),
    # --- products along a response
    "a trace of no tokens": Case(
        "`ForwardTraceActions.steps` must be at least 1, got 0",
        OVERLAY,
        axis("actions: {class_path: ForwardTraceActions, init_args: {steps: 0}}"),
    ),
    "prefixes of chosen tokens": Case(
        "`PrefixActions` multiplies the ratios of all tokens along a response; use `selection: AllTokens`",
        OVERLAY,
        axis("actions: PrefixActions, selection: HighEntropyTokens"),
    ),
    "single tokens of prefixes": Case(
        "`DivergenceMask` needs probabilities of single tokens and has no meaning over `PrefixActions`",
        OVERLAY,
        axis("actions: PrefixActions, surrogate: DivergenceMask"),
    ),
    "a position clip of zero": Case(
        "`PositionClip.high` must be positive, got 0.0",
        OVERLAY,
        axis("surrogate: {class_path: PositionClip, init_args: {high: 0.0}}"),
    ),
    # --- critic
    "a critic's loss without a critic": Case(
        "`ValueLoss` needs `policy.critic`: give `ValueHead`, say",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: GeneralizedAdvantage, "
            "terms: [{class_path: ValueLoss, init_args: {coef: 0.1, clip: 0.2}}]}}}"
        },
    ),
    "a critic's advantage without its loss": Case(
        "`GeneralizedAdvantage` takes a critic's values; add `ValueLoss` to `objective.terms`",
        [f"{OBJECTIVE}.advantage", "GeneralizedAdvantage"],
    ),
    "a value clip of zero": Case(
        "`ValueLoss.clip` must be positive, got 0.0; null clips nothing",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: GeneralizedAdvantage, "
            "terms: [{class_path: ValueLoss, init_args: {coef: 0.1, clip: 0.0}}]}}}"
        },
    ),
    "unknown critic": Case(
        "no class `ValueHeads`; did you mean `ValueHead`", [f"--{POLICY}.critic", "ValueHeads"]
    ),
    # --- segmenters
    "delimiters that no token contains": Case(
        "no token of the vocabulary contains…`DelimiterSegmenter.delimiters` ('€')",
        ["-c", "more.yaml"],
        {"more.yaml": segments("{class_path: DelimiterSegmenter, init_args: {delimiters: [€]}}")},
    ),
    "two ways to cut by entropy": Case(
        "`EntropySegmenter` needs either `threshold`",
        ["-c", "more.yaml"],
        {
            "more.yaml": segments(
                "{class_path: EntropySegmenter, init_args: {threshold: 1, quantile: 0.5}}"
            )
        },
    ),
    "a segmenter whose blocks are no neighbours": Case(
        "`Jumps.segment` gives token 2 of row 0 the number 0…must be neighbours",
        ["-c", "more.yaml"],
        {"more.yaml": segments("tests.cli.mistakes.test_objective.Jumps")},
        late=True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
