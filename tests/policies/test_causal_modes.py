"""Gradient checkpointing, and the modes of a rollout and of an update."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy, Lora, rollout_mode
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from tests.support.adapters import (
    CPU,
    PROMPTS,
    RESPONSES,
    always_share,  # noqa: F401
    gradients,
    move_adapters,
)
from tests.support.builders import make_prompts, make_rollout, relative_error, seeded


def count_layer_calls(policy: CausalPolicy) -> list[int]:
    calls = [0]

    def count(*_):
        calls[0] += 1

    for layer in policy.decoder().layers:
        layer.self_attn.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tiny_folder, lora):
    results, calls = {}, {}
    rollout = make_rollout(PROMPTS, RESPONSES)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        policy = CausalPolicy(tiny_folder, lora=lora, gradient_checkpointing=checkpointing)
        policy.build(device=CPU, reference=False)
        if lora is not None:
            move_adapters(policy)
        with rollout_mode(policy):  # the modes that a rollout leaves behind must still checkpoint
            pass
        count = count_layer_calls(policy)
        loss = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT.sum()
        results[checkpointing] = gradients(policy, loss)
        calls[checkpointing] = count[0]
    assert calls == {False: 2, True: 4}
    for one, other in zip(results[True], results[False], strict=True):
        assert relative_error(one, other) < 1e-6


def modes(policy: CausalPolicy) -> list[tuple[str, bool, bool | None]]:
    return [
        (name, m.training, getattr(m, "gradient_checkpointing", None))
        for name, m in policy.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_rollout_mode_restores_every_mode_also_after_an_exception(tiny_folder, fails):
    policy = CausalPolicy(tiny_folder, lora=Lora(rank=2), gradient_checkpointing=True)
    policy.build(device=CPU, reference=True)
    policy.decoder().layers[1].eval()  # a mixture that a plain `train()` would lose
    before = modes(policy)
    assert {training for _, training, _ in before} == {True, False}
    assert any(flag for *_, flag in before)
    try:
        with rollout_mode(policy):
            assert not any(training or flag for _, training, flag in modes(policy))
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyError("in the middle")
    except KeyError:
        assert fails
    assert modes(policy) == before
    assert torch.is_grad_enabled()


def test_sampling_from_a_training_policy_equals_sampling_from_one_in_eval_mode(tiny_folder):
    def sample(policy):
        return LocalSampler().sample(
            policy,
            make_prompts([5, 3]),
            3,
            SamplingRequest(FullVocabulary(), 1.0, 8),
            generator=seeded(0),
        )

    rollouts = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        policy = CausalPolicy(
            tiny_folder, lora=Lora(rank=4, dropout=0.5), gradient_checkpointing=checkpointing
        )
        policy.build(device=CPU, reference=False)
        move_adapters(policy)
        if not checkpointing:
            policy.eval()
        rollouts.append(sample(policy))
        assert policy.network.training == checkpointing
    assert torch.equal(rollouts[0].tokens_BL, rollouts[1].tokens_BL)
    assert torch.equal(rollouts[0].behaviour_logprobs_BT, rollouts[1].behaviour_logprobs_BT)
