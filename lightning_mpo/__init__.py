"""lightning-mpo: RL post-training of language models.

One action may be a token, a block of tokens or a whole response. `from lightning_mpo import
Objective, RolloutLoop, TinyPolicy` imports classes of a run. The package itself imports nothing
heavy: each name is loaded at its first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mpo.callbacks import (
        ExactResume,
        Export,
        KLTracking,
        Predictions,
        Preemption,
        ReferenceUpdate,
        Report,
        RolloutLoop,
        RolloutProgressBar,
        Samples,
        Throughput,
        Watchdog,
    )
    from lightning_mpo.data import (
        Arithmetic,
        Countdown,
        JsonLines,
        Multiplication,
        PromptDataModule,
        PromptFile,
        Scaffolded,
        Spans,
        Splits,
        StarGraphs,
        Svamp,
        Table,
        Tails,
    )
    from lightning_mpo.errors import UserError
    from lightning_mpo.modules import HeadWarmup, PolicyOptimization, SupervisedWarmup
    from lightning_mpo.objective.action_spaces import (
        ActionSpace,
        SegmentActions,
        SequenceActions,
        TokenActions,
    )
    from lightning_mpo.objective.advantages import (
        Advantage,
        GeneralizedAdvantage,
        GroupRelative,
        LeaveOneOut,
        PrefixTree,
        ReturnToGo,
    )
    from lightning_mpo.objective.block_actions import BlockActions
    from lightning_mpo.objective.block_weights import ExplicitWeights, FutureShare, GeometricDecay
    from lightning_mpo.objective.corrections import Correction, MaskedWeights, TruncatedWeights
    from lightning_mpo.objective.decoupled import DecoupledRelative
    from lightning_mpo.objective.divergence_mask import DivergenceMask
    from lightning_mpo.objective.first_tokens import FirstTokens
    from lightning_mpo.objective.future_credit import (
        CentredCredit,
        FutureCredit,
        OutcomeCredit,
        SameCredit,
        StateCredit,
    )
    from lightning_mpo.objective.head_policy_loss import HeadPolicyLoss
    from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
    from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo, Likelihood
    from lightning_mpo.objective.linear_bound import LinearBound
    from lightning_mpo.objective.objective import Objective
    from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
    from lightning_mpo.objective.position_clip import PositionClip
    from lightning_mpo.objective.preferences import PairwiseLogistic, Preferences
    from lightning_mpo.objective.reductions import (
        ConstantLength,
        Reduction,
        SequenceMean,
        TokenMean,
    )
    from lightning_mpo.objective.segmenters import DelimiterSegmenter, EntropySegmenter, Segmenter
    from lightning_mpo.objective.selection import (
        AllTokens,
        HighEntropyTokens,
        SampledTokens,
        Selection,
    )
    from lightning_mpo.objective.supports import (
        AllowedTokens,
        FullVocabulary,
        MinP,
        Nucleus,
        Support,
        TopK,
    )
    from lightning_mpo.objective.surrogates import (
        AsymmetricRatio,
        BoundedTokens,
        ClippedRatio,
        ClippedWeight,
        PolicyGradient,
        Surrogate,
    )
    from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep, LossTerm, WeightPenalty
    from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
    from lightning_mpo.objective.value_loss import ValueLoss
    from lightning_mpo.policies import (
        CausalPolicy,
        Lora,
        MaskedPolicy,
        MedusaHeads,
        ParallelHeads,
        Policy,
        Quantization,
        SeparateCritic,
        SequentialHeads,
        TinyMaskedPolicy,
        TinyPolicy,
        ValueHead,
    )
    from lightning_mpo.resume.metrics_csv import MetricsCSV
    from lightning_mpo.rewards import (
        CodeAnswer,
        Completion,
        CountdownAnswer,
        ExactAnswer,
        Finished,
        FunctionReward,
        GradedAnswer,
        MathAnswer,
        OverlongPenalty,
        Reward,
    )
    from lightning_mpo.rollout import DynamicSampling
    from lightning_mpo.sampling import DiffusionSampler, LocalSampler, PrefixReplay, Sampler
    from lightning_mpo.types import PromptRow

__version__ = "0.1.0"

_NAMES = {
    "objective.action_spaces": "ActionSpace SegmentActions SequenceActions TokenActions",
    "objective.advantages": (
        "Advantage GeneralizedAdvantage GroupRelative LeaveOneOut PrefixTree ReturnToGo"
    ),
    "callbacks": (
        "ExactResume Export KLTracking Predictions Preemption ReferenceUpdate "
        "Report RolloutLoop RolloutProgressBar Samples Throughput Watchdog"
    ),
    "objective.block_actions": "BlockActions",
    "objective.first_tokens": "FirstTokens",
    "objective.future_credit": "CentredCredit FutureCredit OutcomeCredit SameCredit StateCredit",
    "objective.block_weights": "ExplicitWeights FutureShare GeometricDecay",
    "objective.corrections": "Correction MaskedWeights TruncatedWeights",
    "data": (
        "Arithmetic Countdown JsonLines Multiplication PromptDataModule PromptFile "
        "Scaffolded Spans Splits StarGraphs Svamp Table Tails"
    ),
    "objective.decoupled": "DecoupledRelative",
    "objective.divergence_mask": "DivergenceMask",
    "errors": "UserError",
    "objective.head_policy_loss": "HeadPolicyLoss",
    "objective.kl": "AdaptiveCoefficient ConstantCoefficient KLPenalty",
    "modules": "HeadWarmup PolicyOptimization SupervisedWarmup",
    "objective.likelihoods": "CoupledElbo Denoising Elbo Likelihood",
    "objective.linear_bound": "LinearBound",
    "objective.objective": "Objective",
    "objective.one_pass": "CoupledTokens MeanField",
    "objective.position_clip": "PositionClip",
    "objective.preferences": "PairwiseLogistic Preferences",
    "policies": (
        "CausalPolicy Lora MaskedPolicy MedusaHeads ParallelHeads Policy Quantization "
        "SeparateCritic SequentialHeads TinyMaskedPolicy TinyPolicy ValueHead"
    ),
    "objective.reductions": "ConstantLength Reduction SequenceMean TokenMean",
    "rewards": (
        "CodeAnswer Completion CountdownAnswer ExactAnswer Finished FunctionReward GradedAnswer "
        "MathAnswer OverlongPenalty Reward"
    ),
    "resume.metrics_csv": "MetricsCSV",
    "rollout": "DynamicSampling",
    "sampling": "DiffusionSampler LocalSampler PrefixReplay Sampler",
    "objective.segmenters": "DelimiterSegmenter EntropySegmenter Segmenter",
    "objective.selection": "AllTokens HighEntropyTokens SampledTokens Selection",
    "objective.supports": "AllowedTokens FullVocabulary MinP Nucleus Support TopK",
    "objective.surrogates": (
        "AsymmetricRatio BoundedTokens ClippedRatio ClippedWeight PolicyGradient Surrogate"
    ),
    "objective.terms": "EntropyBonus HeadUpkeep LossTerm WeightPenalty",
    "objective.trace_actions": "ForwardTraceActions PrefixActions",
    "types": "PromptRow",
    "objective.value_loss": "ValueLoss",
}
"""Public names by the module that defines them."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["ActionSpace", "AdaptiveCoefficient", "Advantage", "AllTokens"]
__all__ += ["AllowedTokens", "Arithmetic"]
__all__ += ["AsymmetricRatio", "BlockActions", "BoundedTokens", "CausalPolicy", "CentredCredit"]
__all__ += ["ClippedRatio", "ClippedWeight", "CodeAnswer", "Completion", "ConstantCoefficient"]
__all__ += ["ConstantLength"]
__all__ += ["Correction", "Countdown", "CountdownAnswer", "CoupledElbo", "CoupledTokens"]
__all__ += ["DecoupledRelative"]
__all__ += ["DelimiterSegmenter", "Denoising"]
__all__ += ["DiffusionSampler", "DivergenceMask", "DynamicSampling", "Elbo", "EntropyBonus"]
__all__ += ["EntropySegmenter", "ExactAnswer", "ExactResume", "ExplicitWeights", "Export"]
__all__ += [
    "Finished",
    "FirstTokens",
    "ForwardTraceActions",
    "FullVocabulary",
    "FunctionReward",
    "FutureCredit",
]
__all__ += [
    "FutureShare",
    "GeneralizedAdvantage",
    "GeometricDecay",
    "GradedAnswer",
    "GroupRelative",
]
__all__ += ["HeadPolicyLoss", "HeadUpkeep", "HeadWarmup", "HighEntropyTokens", "JsonLines"]
__all__ += ["KLPenalty", "KLTracking", "LeaveOneOut", "Likelihood", "LinearBound", "LocalSampler"]
__all__ += ["Lora", "LossTerm", "MaskedPolicy", "MaskedWeights", "MathAnswer", "MeanField"]
__all__ += ["MedusaHeads", "MetricsCSV", "MinP", "Multiplication", "Nucleus", "Objective"]
__all__ += ["OutcomeCredit", "OverlongPenalty", "PairwiseLogistic", "ParallelHeads", "Policy"]
__all__ += ["PolicyGradient", "PolicyOptimization", "PositionClip", "Predictions", "Preemption"]
__all__ += [
    "Preferences",
    "PrefixActions",
    "PrefixReplay",
    "PrefixTree",
    "PromptDataModule",
    "PromptFile",
    "PromptRow",
]
__all__ += ["Quantization", "Reduction", "ReferenceUpdate", "Report", "ReturnToGo", "Reward"]
__all__ += [
    "RolloutLoop",
    "RolloutProgressBar",
    "SameCredit",
    "SampledTokens",
    "Sampler",
    "Samples",
    "Scaffolded",
]
__all__ += ["SegmentActions", "Segmenter", "Selection", "SeparateCritic", "SequenceActions"]
__all__ += ["SequenceMean", "SequentialHeads", "Spans", "Splits", "StarGraphs", "StateCredit"]
__all__ += ["SupervisedWarmup", "Support", "Surrogate", "Svamp", "Table", "Tails"]
__all__ += ["Throughput", "TinyMaskedPolicy", "TinyPolicy", "TokenActions", "TokenMean", "TopK"]
__all__ += ["TruncatedWeights", "UserError", "ValueHead", "ValueLoss", "Watchdog"]
__all__ += ["WeightPenalty", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        message = f"module 'lightning_mpo' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(f"lightning_mpo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
