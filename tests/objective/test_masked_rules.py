"""Members that have no meaning beside a likelihood of masked models are refused; the others are not."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
from lightning_mpo.objective.advantages import (
    GeneralizedAdvantage,
    LeaveOneOut,
    PrefixTree,
    ReturnToGo,
)
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.corrections import TruncatedWeights
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.head_policy_loss import HeadPolicyLoss
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
from lightning_mpo.objective.linear_bound import LinearBound
from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.selection import SampledTokens
from lightning_mpo.objective.supports import Nucleus, TopK
from lightning_mpo.objective.surrogates import AsymmetricRatio, BoundedTokens, ClippedRatio
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.objective.value_loss import ValueLoss
from tests.support.runs import make_objective

BETA = ConstantCoefficient(0.1)
ESPO: dict[str, Any] = {"likelihood": CoupledElbo(), "actions": SequenceActions()}
BGPO: dict[str, Any] = {
    "likelihood": Elbo(),
    "actions": SequenceActions(mean=False),
    "surrogate": LinearBound(),
    "reduction": SequenceMean(),
}
AGRPO: dict[str, Any] = {"likelihood": Denoising(), "reduction": ConstantLength(1)}
FIELD: dict[str, Any] = {"likelihood": MeanField()}
PAIR: dict[str, Any] = {"likelihood": CoupledTokens()}
REFUSED = {
    "heads": (
        AGRPO | {"actions": BlockActions(length=2, source="mtp")},
        "`Denoising` is for masked language models, which have no multi-token heads; use "
        "`actions: TokenActions`",
    ),
    "a loss of heads": (
        FIELD | {"terms": [HeadPolicyLoss()]},
        "`MeanField` is for masked language models, which have no multi-token heads",
    ),
    "prefixes": (
        AGRPO | {"actions": PrefixActions()},
        "`PrefixActions` multiplies ratios from left to right, and `Denoising` is for models that "
        "reveal tokens in any order; use `actions: TokenActions` or `SequenceActions`",
    ),
    "traces": (
        PAIR | {"actions": ForwardTraceActions()},
        "`ForwardTraceActions` multiplies ratios from left to right, and `CoupledTokens` is for",
    ),
    "tokens of an ELBO": (
        ESPO | {"actions": TokenActions()},
        "`CoupledElbo` estimates the log-prob of whole responses, and `TokenActions` takes those "
        "of single tokens; use `actions: SequenceActions`",
    ),
    "tokens of a sampled ELBO": (
        BGPO | {"actions": TokenActions()},
        "`Elbo` estimates the log-prob of whole responses, and `TokenActions` takes those of",
    ),
    "the token form of an ELBO": (
        ESPO | {"actions": SequenceActions(form="token")},
        "`CoupledElbo` estimates the log-prob of whole responses, and `SequenceActions` takes",
    ),
    "blocks of steps": (
        AGRPO | {"actions": BlockActions(length=2)},
        "`BlockActions` groups neighbours, and `Denoising` scores the tokens of one step, which "
        "are seldom neighbours; use `actions: TokenActions` or `SequenceActions`",
    ),
    "returns": (
        FIELD | {"advantage": ReturnToGo()},
        "`ReturnToGo` gives the tokens of a response different advantages from left to right, and "
        "`MeanField` is for models that reveal them in any order; use `advantage: GroupRelative` "
        "or `LeaveOneOut`",
    ),
    "trees": (
        FIELD | {"advantage": PrefixTree(), "reduction": TokenMean()},
        "`PrefixTree` gives the tokens of a response different advantages from left to right",
    ),
    "a critic": (
        FIELD | {"advantage": GeneralizedAdvantage(), "terms": [ValueLoss()]},
        "`GeneralizedAdvantage` gives the tokens of a response different advantages",
    ),
    "chosen tokens": (
        AGRPO | {"selection": SampledTokens()},
        "`SampledTokens` chooses tokens, and `Denoising` chooses them already; use `selection: "
        "AllTokens`",
    ),
    "promising tokens of an ELBO": (
        ESPO | {"support": TopK(4)},
        "`TopK` is stored for the steps of the sampler, and `CoupledElbo` hides tokens at random; "
        "use `likelihood: Denoising`, or `support: FullVocabulary`",
    ),
    "promising tokens of one pass": (
        FIELD | {"support": Nucleus(0.9)},
        "`Nucleus` is stored for the steps of the sampler, and `MeanField` hides tokens at random",
    ),
    "a correction of steps": (
        AGRPO | {"correction": TruncatedWeights("token")},
        "`correction` compares the log-probs of sampler and trainer, and `Denoising` takes the "
        "sampler's log-probs as the old ones; use `correction: null`",
    ),
    "a correction of one pass": (
        FIELD | {"correction": TruncatedWeights("token")},
        "`MeanField` scores rows in other states than the sampler's; use `correction: null`",
    ),
    "DPPO in one pass": (
        FIELD | {"surrogate": DivergenceMask()},
        "`DivergenceMask` compares distributions of the sampler, which `MeanField` does not "
        "score; use `surrogate: ClippedRatio`",
    ),
    "DPPO over candidates of steps": (
        AGRPO | {"surrogate": DivergenceMask(top_k=2)},
        "`DivergenceMask` compares distributions of the sampler, which `Denoising` does not score",
    ),
    "ASPO's entropies": (
        AGRPO | {"surrogate": AsymmetricRatio(wide=0.4)},
        "`AsymmetricRatio` compares distributions of the sampler, which `Denoising` does not",
    ),
    "GMPO over an ELBO": (
        ESPO | {"surrogate": BoundedTokens()},
        "`BoundedTokens` bounds the ratios of single tokens, and `CoupledElbo` estimates the "
        "log-prob of whole responses; use `surrogate: ClippedRatio`",
    ),
    "a clip by position": (
        FIELD | {"surrogate": PositionClip()},
        "`PositionClip` widens its range from left to right, and `MeanField` is for models that "
        "reveal tokens in any order; use `surrogate: ClippedRatio`",
    ),
    "a penalty in the reward": (
        FIELD | {"terms": [KLPenalty(BETA, "k1", "reward")]},
        "`KLPenalty` needs a value or a divergence for each token from left to right, which "
        "`MeanField` does not give; use `KLPenalty` with `place: loss` and `estimator: k2` or `k3`",
    ),
    "an exact divergence": (
        AGRPO | {"support": TopK(4), "terms": [KLPenalty(BETA, "exact")]},
        "`KLPenalty` needs a value or a divergence for each token from left to right, which "
        "`Denoising` does not give",
    ),
    "a penalty of single tokens over an ELBO": (
        ESPO | {"terms": [KLPenalty(BETA, "k3")]},
        "`KLPenalty.level: token` compares single tokens, and `CoupledElbo` estimates the "
        "log-prob of whole responses; use `level: sequence` and `estimator: k2`",
    ),
    "a penalty of single tokens over a sampled ELBO": (
        BGPO | {"terms": [KLPenalty(BETA, "k2")]},
        "`KLPenalty.level: token` compares single tokens, and `Elbo` estimates",
    ),
    "a penalty of responses over steps": (
        AGRPO | {"terms": [KLPenalty(BETA, "k2", level="sequence")]},
        "`KLPenalty.level: sequence` compares log-probs of whole responses, and `Denoising` gives "
        "those of single tokens; use `level: token`",
    ),
    "a penalty of responses over one pass": (
        FIELD | {"terms": [KLPenalty(BETA, "k2", level="sequence")]},
        "`KLPenalty.level: sequence` compares log-probs of whole responses, and `MeanField`",
    ),
    "an entropy over an ELBO": (
        BGPO | {"terms": [EntropyBonus(0.01)]},
        "`EntropyBonus` takes the mean entropy of single tokens, and `Elbo` gives one estimate for "
        "a whole response; leave it out, or use `likelihood: Denoising`",
    ),
    "an entropy over a pair": (
        ESPO | {"terms": [EntropyBonus(0.01)]},
        "`EntropyBonus` takes the mean entropy of single tokens, and `CoupledElbo`",
    ),
    "weights of steps over sequences": (
        AGRPO | {"likelihood": Denoising(importance="entropy"), "actions": SequenceActions()},
        "`Denoising.importance: entropy` weighs tokens, and `SequenceActions` takes one ratio for "
        "all tokens of a step; use `actions: TokenActions`, or `importance: uniform`",
    ),
    "weights of steps in a mean": (
        {"likelihood": Denoising(importance="entropy"), "reduction": TokenMean()},
        "`Denoising.importance: entropy` weighs losses of steps, which `TokenMean` would divide "
        "away; use `reduction: ConstantLength`",
    ),
}
ALLOWED = {
    "ESPO": ESPO
    | {"surrogate": ClippedRatio(), "terms": [KLPenalty(BETA, "k2", level="sequence")]},
    "ESPO with a clip of zero": ESPO | {"surrogate": ClippedRatio(0.0, 0.0)},
    "BGPO": BGPO,
    "BGPO with its difference over the length": BGPO | {"actions": SequenceActions()},
    "a clip on samples of an ELBO": BGPO | {"surrogate": ClippedRatio()},
    "BGPO's bound of a mean": ESPO | {"surrogate": LinearBound()},
    "BGPO's bound of tokens": AGRPO | {"surrogate": LinearBound()},
    "BGPO's bound of a causal model": {"surrogate": LinearBound()},
    "AGRPO": AGRPO | {"terms": [KLPenalty(BETA), EntropyBonus(0.01)], "advantage": LeaveOneOut()},
    "AGRPO by entropy": AGRPO | {"likelihood": Denoising(importance="entropy")},
    "promising tokens of steps": AGRPO | {"support": Nucleus(0.99)},
    "one ratio for each step": AGRPO | {"actions": SequenceActions(mean=False)},
    "DPPO's mask over steps": AGRPO | {"surrogate": DivergenceMask()},
    "diffu-GRPO": FIELD | {"terms": [KLPenalty(BETA), EntropyBonus(0.01)]},
    "blocks of one pass": FIELD | {"actions": BlockActions(length=2)},
    "coupled-GRPO": PAIR | {"surrogate": ClippedRatio(0.5, 0.5)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name):
    axes, message = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        make_objective(**axes)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_has_a_meaning_is_not_refused(name):
    assert make_objective(**ALLOWED[name]).likelihood == ALLOWED[name].get("likelihood")


def test_a_divergence_of_responses_is_k2_in_the_loss():
    for options in ({"estimator": "k3"}, {"estimator": "k2", "place": "reward"}):
        with pytest.raises(UserError, match="`KLPenalty.level: sequence` squares the difference"):
            KLPenalty(BETA, level="sequence", **options)
