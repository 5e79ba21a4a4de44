"""What cannot stand together is refused by name, as are options out of range."""

from __future__ import annotations

import pytest

from lightning_mpo.action_spaces import BlockActions, SequenceActions
from lightning_mpo.advantages import LeaveOneOut, PrefixTree
from lightning_mpo.corrections import Correction, MaskedWeights, TruncatedWeights
from lightning_mpo.errors import UserError
from lightning_mpo.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.selection import HighEntropyTokens, SampledTokens
from lightning_mpo.supports import TopK
from lightning_mpo.surrogates import AsymmetricRatio, BoundedTokens, DivergenceMask
from lightning_mpo.terms import WeightPenalty
from tests.helpers import subclasses
from tests.modules.runs import make_objective

REWARD_KL = KLPenalty(ConstantCoefficient(0.1), "k1", "reward")
REFUSED = {
    "DPPO over blocks": (
        {"surrogate": DivergenceMask(), "actions": BlockActions()},
        "`DivergenceMask` needs probabilities of single tokens and has no meaning over `BlockActions`",
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
        "`SampledTokens.unbiased` takes means over whole responses, of which `TopK.outside: drop` takes tokens away",
    ),
    "T-SPMO with a penalty in the reward": (
        {"advantage": PrefixTree(), "kl": REWARD_KL},
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
    "a critic with a group baseline": ({"critic": "any"}, "`critic` fits values that `GroupRelative` does not use"),
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


OUT_OF_RANGE = {
    "`DivergenceMask.delta` must be positive, got 0": lambda: DivergenceMask(delta=0),
    "`DivergenceMask.delta_up` must be positive, got -1": lambda: DivergenceMask(delta_up=-1),
    "`DivergenceMask.divergence` must be 'tv' or 'kl', got 'js'": lambda: DivergenceMask(divergence="js"),
    "`DivergenceMask.cap` must be at least 1, got 0.5": lambda: DivergenceMask(cap=0.5),
    "`DivergenceMask.top_k` must be at least 1, got 0": lambda: DivergenceMask(top_k=0),
    "`BoundedTokens.low` must be positive, got 0": lambda: BoundedTokens(low=0),
    "`BoundedTokens.high` must be positive, got -0.4": lambda: BoundedTokens(high=-0.4),
    "`AsymmetricRatio.wide` must be in (0, 1), got 1": lambda: AsymmetricRatio(wide=1),
    "`SampledTokens.prefix` must be at least 0, got -1": lambda: SampledTokens(prefix=-1),
    "`SampledTokens.cap` must be at least 1 and not below `prefix` (50), got 10": lambda: SampledTokens(cap=10),
    "`SampledTokens.probability` must be in (0, 1], got 0": lambda: SampledTokens(probability=0),
    "`SampledTokens.cap_mode` must be 'scan' or 'uniform', got 'left'": lambda: SampledTokens(cap_mode="left"),
    "`SampledTokens.unbiased` needs `cap: null`": lambda: SampledTokens(unbiased=True),
    "`HighEntropyTokens.share` must be in (0, 1], got 0": lambda: HighEntropyTokens(0),
    "`TruncatedWeights.cap` must be positive, got 0": lambda: TruncatedWeights(cap=0),
    "`TruncatedWeights.level` must be 'token' or 'sequence', got 'row'": lambda: TruncatedWeights("row"),
    "`MaskedWeights.low` must be in [0, cap), got 3 and a cap of 3.0": lambda: MaskedWeights(low=3),
    "`WeightPenalty.coef` must be positive, got 0; `penalty: null` leaves it out": lambda: WeightPenalty(0),
}


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_options_out_of_range_are_refused(message):
    with pytest.raises(UserError) as refusal:
        OUT_OF_RANGE[message]()
    assert str(refusal.value).startswith(message)


def test_every_correction_is_refused_where_it_counts_twice():
    assert subclasses(Correction) == {TruncatedWeights, MaskedWeights}
