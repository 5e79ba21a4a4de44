"""The gate before the first update: what it lets through and what it refuses, with the cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.policies import causal
from lightning_mpo.policies.packing import lay_out
from lightning_mpo.rollout.parity import Parity, ParityError, check_parity
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from tests.support.builders import make_prompts, seeded

FULL, TOP = FullVocabulary(), TopK(4)


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    """Let groups share lines: at 32 dimensions attention would cost more than it saves."""
    monkeypatch.setattr(
        "lightning_mpo.policies.packing._cost", lambda widths, lines, hidden_size: len(lines)
    )


@pytest.fixture
def policy(tiny_policy):
    return tiny_policy(sharp=8.0)


def sample(policy, support=FULL, temperature=1.0):
    return LocalSampler().sample(
        policy,
        make_prompts([6, 3, 5]),
        4,
        SamplingRequest(support, temperature, 10),
        generator=seeded(0),
    )


def refusal(policy, rollout, temperature=1.0, exact=True) -> str:
    with pytest.raises(ParityError) as caught:
        check_parity(policy, rollout, temperature=temperature, exact=exact)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("support", [FULL, TOP], ids=["full", "top"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(policy, support, temperature):
    parity = check_parity(
        policy, sample(policy, support, temperature), temperature=temperature, exact=True
    )
    assert 0 <= parity.mean <= parity.p99 <= parity.max < 1e-4


@pytest.mark.parametrize("support", [FULL, TOP], ids=["full", "top"])
@pytest.mark.parametrize(("sampler", "trainer"), [(0.7, 1.0), (1.0, 0.7), (1.5, 1.0)])
@pytest.mark.parametrize("exact", [True, False])
def test_another_temperature_is_named(policy, support, sampler, trainer, exact):
    text = refusal(policy, sample(policy, support, sampler), trainer, exact)
    if exact:
        assert f"the sampler used temperature {sampler}, the trainer {trainer}" in text
    assert "sampler and trainer disagree by" in text
    assert "temperature" in text


def test_full_logprobs_beside_a_stored_support_are_named(policy):
    rollout = sample(policy, TOP)
    with torch.no_grad():
        full = replace(rollout, support_BTK=None)
        recorded = policy.score(full, rollout.response_mask_BT, temperature=1.0).logprobs_BT
    text = refusal(policy, replace(rollout, behaviour_logprobs_BT=recorded))
    assert "recorded full-vocabulary log-probs while the trainer takes them on the support" in text


def test_a_support_that_the_trainer_does_not_apply_is_named(policy):
    """The classic bug: the ratio is then the kept mass (docs/algorithms.md 16.2, invariant 7)."""
    rollout = sample(policy, TOP)
    dropped = replace(rollout, support_BTK=None, support_mask_BTK=None)
    assert "the sampler drew from a truncated support that the trainer does not apply" in refusal(
        policy, dropped
    )


def test_position_ids_of_the_trainer_that_depend_on_the_batch_are_named(policy, monkeypatch):
    rollout = sample(policy)

    def broken(*args, **kwargs):
        lines = lay_out(*args, **kwargs)
        R, L = lines.input_ids_RL.shape
        return replace(
            lines, position_ids_RL=torch.arange(L).repeat(R, 1)
        )  # responses not set back to their prompt

    monkeypatch.setattr(causal, "lay_out", broken)
    text = refusal(policy, rollout)
    assert "the trainer scores padded and unpadded rows differently" in text
    assert (
        "positions or attention of this model depend on padding; try `policy.share_prompts: false`"
        in text
    )


def test_an_attention_mask_that_leaks_between_responses_is_named(policy, monkeypatch):
    rollout = sample(policy)

    def broken(*args, **kwargs):
        return replace(
            lay_out(*args, **kwargs), shared=False
        )  # plain causal attention: a row sees its sisters

    monkeypatch.setattr(causal, "lay_out", broken)
    assert "the trainer scores padded and unpadded rows differently" in refusal(policy, rollout)


def test_position_ids_of_the_sampler_are_among_the_causes_named(policy, monkeypatch):
    decoder = policy.decoder()

    def shifted(input_ids, position_ids, **options):
        late = (
            position_ids + 3 if input_ids.shape[1] == 1 else position_ids
        )  # as if left padding were counted
        return decoder(input_ids=input_ids, position_ids=late, **options)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "decoder", lambda reference=False: shifted)
        rollout = sample(policy)
    text = refusal(policy, rollout)
    assert "neither temperature nor support explains it; compare position ids" in text


def test_other_weights_are_refused_without_a_false_accusation(policy):
    rollout = sample(policy, TOP)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)
    assert "neither temperature nor support explains it" in refusal(policy, rollout)


def test_only_the_first_rows_are_compared(policy):
    rollout = sample(policy)
    broken = rollout.behaviour_logprobs_BT.clone()
    broken[9:] += 1.0
    rollout = replace(rollout, behaviour_logprobs_BT=broken)
    check_parity(policy, rollout, temperature=1.0, exact=True, rows=9)
    assert "disagree" in refusal(policy, rollout)


def test_the_bounds():
    assert Parity.of(torch.tensor([0.0, -9e-4])).passes(exact=True)
    assert not Parity.of(torch.tensor([0.0, -1.1e-3])).passes(exact=True)
    rough = torch.full((1000,), 0.05)
    assert Parity.of(rough).passes(exact=False)
    assert not Parity.of(rough).passes(exact=True)
    assert not Parity.of(rough + 0.02).passes(exact=False)
    rough[:20] = -0.5  # the mean stays, the 99th percentile does not
    assert not Parity.of(rough).passes(exact=False)
    assert Parity.of(rough * 0.5).passes(exact=False)
    assert Parity.of(torch.tensor([1.0, -3.0])) == Parity(2.0, pytest.approx(2.98), 3.0)
