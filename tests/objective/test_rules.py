"""What cannot stand together is refused by name, as are options out of range."""

from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.advantages import (
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    PrefixTree,
    ReturnToGo,
)
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.corrections import Correction, MaskedWeights, TruncatedWeights
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import SequenceMean
from lightning_mpo.objective.selection import HighEntropyTokens, SampledTokens
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.surrogates import (
    AsymmetricRatio,
    BoundedTokens,
    ClippedRatio,
    ClippedWeight,
)
from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep, WeightPenalty
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.objective.value_loss import ValueLoss
from tests.support.builders import subclasses
from tests.support.runs import make_objective

REWARD_KL = KLPenalty(ConstantCoefficient(0.1), "k1", "reward")
HALF = ConstantCoefficient(0.5)
REFUSED = {
    "DPPO over blocks": (
        {"surrogate": DivergenceMask(), "actions": BlockActions()},
        "`DivergenceMask` needs probabilities of single tokens and has no meaning over `BlockActions`",
    ),
    "DPPO over prefixes": (
        {"surrogate": DivergenceMask(), "actions": PrefixActions()},
        "`DivergenceMask` needs probabilities of single tokens and has no meaning over `PrefixActions`",
    ),
    "prefixes of chosen tokens": (
        {"selection": SampledTokens(), "actions": PrefixActions()},
        "`PrefixActions` multiplies the ratios of all tokens along a response; use `selection: AllTokens`, not "
        "`SampledTokens`",
    ),
    "tokens ahead that are not chosen": (
        {"selection": HighEntropyTokens(), "actions": ForwardTraceActions()},
        "`ForwardTraceActions` multiplies the ratios of all tokens along a response; use `selection: AllTokens`",
    ),
    "ASPO's entropy clip over sequences": (
        {"surrogate": AsymmetricRatio(wide=0.4), "actions": SequenceActions()},
        "`AsymmetricRatio` needs probabilities of single tokens and has no meaning over `SequenceActions`",
    ),
    "fractional weights over sequences": (
        {"selection": SampledTokens(cap=None, unbiased=True), "actions": SequenceActions()},
        "`SampledTokens` weighs single tokens, which has no meaning over `SequenceActions`",
    ),
    "T-SPMO over blocks": (
        {"advantage": PrefixTree(), "actions": BlockActions()},
        "`PrefixTree` gives credit to single tokens; use `actions: TokenActions`, not `BlockActions`",
    ),
    "T-SPMO over chosen tokens": (
        {"advantage": PrefixTree(), "selection": SampledTokens()},
        "`PrefixTree` chooses its tokens itself; use `selection: AllTokens`, not `SampledTokens`",
    ),
    "T-SPMO over dropped tokens": (
        {"advantage": PrefixTree(), "support": TopK(4, outside="drop")},
        "`PrefixTree` would lose branches to `TopK.outside: drop`; use `unite`",
    ),
    "whole means over dropped tokens": (
        {"selection": SampledTokens(cap=None, unbiased=True), "support": TopK(4, outside="drop")},
        "`SampledTokens` takes means over whole responses, of which `TopK.outside: drop` takes tokens away",
    ),
    "the fifth of whole responses over dropped tokens": (
        {"selection": HighEntropyTokens(), "support": TopK(4, outside="drop")},
        "`HighEntropyTokens` takes means over whole responses, of which `TopK.outside: drop` takes tokens away; use `unite`",
    ),
    "T-SPMO with means by response": (
        {"advantage": PrefixTree(), "reduction": SequenceMean()},
        "`PrefixTree` lets each branch count once, which `SequenceMean` would undo; use `reduction: TokenMean`",
    ),
    "one advantage for tokens that have several": (
        {"advantage": ReturnToGo(gamma=0.9), "actions": SequenceActions()},
        "`SequenceActions` takes one advantage for a response, and `ReturnToGo` gives its tokens different ones",
    ),
    "one advantage for tokens that pay for their divergence": (
        {"advantage": ReturnToGo(), "actions": SequenceActions(), "terms": [REWARD_KL]},
        "`SequenceActions` takes one advantage for a response, and `ReturnToGo` gives its tokens different ones",
    ),
    "a critic over one action": (
        {
            "advantage": GeneralizedAdvantage(),
            "actions": SequenceActions(mean=False),
            "terms": [ValueLoss()],
        },
        "`SequenceActions` takes one advantage for a response, and `GeneralizedAdvantage` gives its tokens different",
    ),
    "ASPO's entropy clip over chosen tokens": (
        {"surrogate": AsymmetricRatio(wide=0.4), "selection": HighEntropyTokens()},
        "`AsymmetricRatio.wide` is for the most uncertain tokens of whole responses; use `selection: AllTokens`",
    ),
    "T-SPMO with a penalty in the reward": (
        {"advantage": PrefixTree(), "terms": [REWARD_KL]},
        "`PrefixTree` compares rewards of responses; put the KL penalty into the loss",
    ),
    "DPPO with a correction": (
        {"surrogate": DivergenceMask(), "correction": TruncatedWeights()},
        "`DivergenceMask` takes its ratios against the sampler's own log-probs",
    ),
    "a correction of tokens over sequences": (
        {"actions": SequenceActions(), "correction": TruncatedWeights("token")},
        "`TruncatedWeights.level: token` has no meaning over `SequenceActions`; use `level: sequence`",
    ),
    "a critic with a group baseline": (
        {"terms": [ValueLoss()]},
        "`ValueLoss` fits values that `GroupRelative` does not use",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stand_together_is_refused_by_name(name):
    axes, message = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        make_objective(**axes)
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 300


def test_what_can_stand_together_is_not():
    make_objective(surrogate=DivergenceMask(), support=TopK(4))
    make_objective(selection=SampledTokens(), actions=BlockActions())
    make_objective(selection=SampledTokens(), support=TopK(4, outside="drop"))
    make_objective(selection=HighEntropyTokens(), advantage=LeaveOneOut())
    make_objective(correction=MaskedWeights("sequence"), actions=SequenceActions())
    make_objective(advantage=PrefixTree(), support=TopK(4, outside="unite"))
    make_objective(advantage=ReturnToGo(), actions=SequenceActions())
    make_objective(advantage=LeaveOneOut(), actions=SequenceActions(mean=False), terms=[REWARD_KL])
    make_objective(advantage=ReturnToGo(gamma=0.9), actions=SequenceActions(form="token"))


OUT_OF_RANGE = {
    "`DivergenceMask.delta` must be positive, got 0": lambda: DivergenceMask(delta=0),
    "`DivergenceMask.delta_up` must be positive, got -1": lambda: DivergenceMask(delta_up=-1),
    "`DivergenceMask.divergence` must be 'tv' or 'kl', got 'js'": lambda: DivergenceMask(
        divergence="js"
    ),
    "`DivergenceMask.cap` must be at least 1, got 0.5": lambda: DivergenceMask(cap=0.5),
    "`DivergenceMask.top_k` must be at least 1, got 0": lambda: DivergenceMask(top_k=0),
    "`BoundedTokens.low` must be positive, got 0": lambda: BoundedTokens(low=0),
    "`BoundedTokens.high` must be positive, got -0.4": lambda: BoundedTokens(high=-0.4),
    "`AsymmetricRatio.wide` must be in (0, 1), got 1": lambda: AsymmetricRatio(wide=1),
    "`SampledTokens.prefix` must be at least 0, got -1": lambda: SampledTokens(prefix=-1),
    "`SampledTokens.cap` must be at least 1 and not below `prefix` (50), got 10": lambda: (
        SampledTokens(cap=10)
    ),
    "`SampledTokens.probability` must be in (0, 1], got 0": lambda: SampledTokens(probability=0),
    "`SampledTokens.cap_mode` must be 'scan' or 'uniform', got 'left'": lambda: SampledTokens(
        cap_mode="left"
    ),
    "`SampledTokens.unbiased` needs `cap: null`": lambda: SampledTokens(unbiased=True),
    "`HighEntropyTokens.share` must be in (0, 1], got 0": lambda: HighEntropyTokens(0),
    "`TruncatedWeights.cap` must be positive, got 0": lambda: TruncatedWeights(cap=0),
    "`TruncatedWeights.level` must be 'token' or 'sequence', got 'row'": lambda: TruncatedWeights(
        "row"
    ),
    "`MaskedWeights.low` must be in [0, cap), got 3 and a cap of 3.0": lambda: MaskedWeights(low=3),
    "`SequenceActions.form` must be 'sequence' or 'token', got 'row'": lambda: SequenceActions(
        form="row"
    ),
    "`SequenceActions.form: token` needs the mean log-ratio": lambda: SequenceActions(
        mean=False, form="token"
    ),
    "`GroupRelative.scale` must be 'std', 'none' or 'batch', got 'mean'": lambda: GroupRelative(
        "mean"
    ),
    "`KLPenalty.estimator` must be 'k1', 'k2', 'k3' or 'exact', got 'k4'": lambda: KLPenalty(
        HALF, "k4"
    ),
    "`KLPenalty.place` must be 'loss' or 'reward', got 'lose'": lambda: KLPenalty(
        HALF, "k3", "lose"
    ),
    "`ConstantCoefficient.coefficient` must not be negative, got -1": lambda: ConstantCoefficient(
        -1
    ),
    "`AdaptiveCoefficient.coefficient` must be positive, got 0: 0 never": lambda: (
        AdaptiveCoefficient(0.1, 0)
    ),
    "`AdaptiveCoefficient.coefficient` must be positive, got -0.1": lambda: AdaptiveCoefficient(
        0.1, -0.1
    ),
    "`HeadUpkeep.coef` must not be negative, got -1": lambda: HeadUpkeep(-1),
    "`WeightPenalty.coef` must be positive, got 0; leave it out of `terms`": lambda: WeightPenalty(
        0
    ),
}


NAN = float("nan")
NO_NUMBERS = (
    lambda: ConstantCoefficient(NAN),
    lambda: AdaptiveCoefficient(NAN),
    lambda: AdaptiveCoefficient(0.1, NAN),
    lambda: HeadUpkeep(NAN),
    lambda: EntropyBonus(NAN),
    lambda: WeightPenalty(NAN),
    lambda: ValueLoss(NAN),
    lambda: ValueLoss(0.1, NAN),
    lambda: ClippedRatio(NAN, 0.2),
    lambda: ClippedRatio(0.2, NAN),
    lambda: ClippedRatio(0.2, 0.2, NAN),
    lambda: ClippedWeight(0.2, NAN),
    lambda: AsymmetricRatio(high=NAN),
    lambda: AsymmetricRatio(cap_positive=NAN),
    lambda: BoundedTokens(NAN),
    lambda: DivergenceMask(NAN),
    lambda: DivergenceMask(cap=NAN),
)


@pytest.mark.parametrize("build", NO_NUMBERS)
def test_what_is_no_number_is_refused_before_anything_is_loaded(build):
    with pytest.raises(UserError, match="got nan"):
        build()


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_options_out_of_range_are_refused(message):
    with pytest.raises(UserError) as refusal:
        OUT_OF_RANGE[message]()
    assert str(refusal.value).startswith(message)


def test_every_correction_is_refused_where_it_counts_twice():
    assert subclasses(Correction) == {TruncatedWeights, MaskedWeights}
