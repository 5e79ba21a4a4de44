"""LoRA adapters, and the reference beside a policy with them and without."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.adapters import (
    CPU,
    PROMPTS,
    RESPONSES,
    always_share,  # noqa: F401
    lora_policy,
    move_adapters,
    save,
    score,
)
from tests.support.builders import make_rollout, seeded


def test_without_lora_the_reference_is_a_frozen_copy(tiny_policy):
    policy = tiny_policy(reference=True)
    rollout = make_rollout(PROMPTS, RESPONSES)
    before = score(policy, rollout)
    torch.testing.assert_close(score(policy, rollout, reference=True), before, rtol=0, atol=0)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.mul_(1.1)
    assert (score(policy, rollout) - before).abs().max() > 0.01
    torch.testing.assert_close(score(policy, rollout, reference=True), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in policy.reference_network.parameters())
    assert not policy.reference_network.training
    with pytest.raises(RuntimeError, match="the reference was not asked for"):
        score(tiny_policy(), rollout, reference=True)


def test_with_lora_the_reference_is_the_base_with_adapters_off(tiny_folder):
    policy = lora_policy(tiny_folder)
    base = CausalPolicy(tiny_folder)
    base.build(device=CPU, reference=False)
    rollout = make_rollout(PROMPTS, RESPONSES)
    expected = score(base, rollout)
    torch.testing.assert_close(
        score(policy, rollout), expected, rtol=0, atol=1e-6
    )  # adapters start at zero
    move_adapters(policy)
    assert (score(policy, rollout) - expected).abs().max() > 0.01
    torch.testing.assert_close(score(policy, rollout, reference=True), expected, rtol=0, atol=1e-6)
    assert (score(policy, rollout) - expected).abs().max() > 0.01  # and they are on again
    assert policy.reference_network is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_the_reference_of_a_run_that_begins_with_adapters_has_them(tiny_folder, tmp_path, targets):
    path, rollout = str(tmp_path / "last.ckpt"), make_rollout(PROMPTS, RESPONSES)
    lora = Lora(rank=4, alpha=8, targets=targets)
    first = CausalPolicy(tiny_folder, lora=lora)
    first.build(device=CPU, reference=True)
    move_adapters(first)
    save(first, path)
    begun = score(first, rollout)
    assert (begun - score(first, rollout, reference=True)).abs().max() > 0.01

    policy = CausalPolicy(tiny_folder, lora=lora, checkpoint=path)
    policy.build(device=CPU, reference=True)
    move_adapters(policy)
    moved = score(policy, rollout)
    assert (moved - begun).abs().max() > 0.01
    torch.testing.assert_close(score(policy, rollout, reference=True), begun, rtol=0, atol=0)
    hidden_BD = torch.randn(3, policy.config.hidden_size, generator=seeded(1))
    with torch.no_grad():
        torch.testing.assert_close(
            policy.logits(hidden_BD, reference=True), first.logits(hidden_BD), rtol=0, atol=0
        )
    torch.testing.assert_close(
        score(policy, rollout), moved, rtol=0, atol=0
    )  # the present ones are back
    with pytest.raises(RuntimeError, match="half-way"), policy.as_reference():
        raise RuntimeError("half-way")
    torch.testing.assert_close(score(policy, rollout), moved, rtol=0, atol=0)
    assert set(policy.trained_state(policy.state_dict())) == set(
        first.trained_state(first.state_dict())
    )


def test_lora_trains_float32_adapters_over_a_bfloat16_base_and_nothing_else(tiny_folder):
    policy = lora_policy(tiny_folder, dtype="bfloat16")
    policy.check()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all("lora_" not in name and p.dtype == torch.bfloat16 for name, p in frozen.items())
    rollout = make_rollout(PROMPTS, RESPONSES)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # B starts at zero, so A moves from the second step on
        optimizer.zero_grad()
        scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0)
        assert scores.logprobs_BT.dtype == torch.float32
        scores.logprobs_BT.sum().backward()
        before = {name: p.clone() for name, p in trained.items()}
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    assert all(
        torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen
    )


def test_lora_targets_are_checked_by_name(tiny_folder):
    with pytest.raises(UserError, match=r"names no linear layer: \['q_prj'\]; there are"):
        CausalPolicy(tiny_folder, lora=Lora(targets="q_prj")).build(device=CPU, reference=False)
    policy = CausalPolicy(tiny_folder, lora=Lora(rank=2, targets=["q_proj", "v_proj"]))
    policy.build(device=CPU, reference=False)
    owners = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    assert owners == {"q_proj", "v_proj"}


def test_bfloat16_weights_are_not_trained():
    with pytest.raises(
        UserError, match=r"`policy.dtype: bfloat16` without LoRA .* `policy.dtype: float32`"
    ):
        CausalPolicy("anything", dtype="bfloat16").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`lora.rank` must be at least 1, got 0"),
        ({"rank": float("nan")}, "`lora.rank` must be a whole number, got nan"),
        ({"alpha": 0}, "`lora.alpha` must be positive"),
        ({"alpha": -8}, "`lora.alpha` must be positive"),
        ({"alpha": float("nan")}, "`lora.alpha` must be positive"),
        ({"dropout": 1.0}, r"`lora.dropout` must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"`lora.dropout` must be in \[0, 1\), got -0.1"),
        ({"dropout": float("nan")}, r"`lora.dropout` must be in \[0, 1\), got nan"),
        ({"targets": []}, "`lora.targets` is empty"),
        ({"targets": ""}, "`lora.targets` is empty"),
    ],
)
def test_adapters_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Lora(**options)


def test_targets_are_checked_before_the_model_loads(tiny_folder):
    for targets in (["q_proj", "lm_head"], "v_proj", "all-linear"):
        CausalPolicy(tiny_folder, lora=Lora(targets=targets)).check()
    policy = CausalPolicy(tiny_folder, lora=Lora(targets=["q_proj", "query"]))
    with pytest.raises(
        UserError, match=r"`lora.targets` names no linear layer: \['query'\]; there are"
    ):
        policy.check()
    assert policy.network is None
