"""A critic beside adapters, a bfloat16 base and a copy of the trunk; its checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies import (
    CausalPolicy,
    Critic,
    Lora,
    ParallelHeads,
    SeparateCritic,
    ValueHead,
)
from lightning_mpo.policies.base import parameter_groups
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout, seeded
from tests.support.critics import (
    CRITICS,
    PROMPTS,
    REQUEST,
    RESPONSES,
    always_share,  # noqa: F401
    each_critic,
    naive,
    scramble_critic,
    trunk_of,
    values_of,
)

CPU = torch.device("cpu")


# --- a critic of its own --------------------------------------------------------------------------------------------


def test_a_separate_critic_starts_as_the_trunk_and_shares_nothing(policy_with_critic):
    policy, rollout = policy_with_critic("separate", fresh=True), make_rollout(PROMPTS, RESPONSES)
    own, trunk = policy.critic.trunk.state_dict(), policy.decoder().state_dict()
    assert own.keys() == trunk.keys()
    for name, weight in trunk.items():
        assert torch.equal(own[name], weight)
        assert own[name].data_ptr() != weight.data_ptr()
    scramble_critic(policy.critic)
    before = values_of(policy, rollout)
    logprobs = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
    scramble_critic(policy.network)
    assert torch.equal(values_of(policy, rollout), before)
    assert not torch.equal(
        policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT, logprobs
    )
    assert not torch.equal(values_of(policy_with_critic("linear"), rollout), before)


def adapted(folder: str, critic: Critic, *, move: bool = True, **options) -> CausalPolicy:
    policy = CausalPolicy(folder, lora=Lora(rank=4, alpha=8), critic=critic, **options)
    torch.manual_seed(5)
    policy.build(device=CPU, reference=False)
    generator = seeded(6)
    with torch.no_grad():
        for name, weight in policy.network.named_parameters():
            if "lora_" in name and move:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.mark.parametrize("kind", ["linear", "separate"])
def test_with_lora_the_head_reads_the_adapted_trunk_and_the_copy_is_trained_whole(
    tiny_folder, kind
):
    policy, rollout = adapted(tiny_folder, CRITICS[kind]()), make_rollout(PROMPTS, RESPONSES)
    scramble_critic(policy.critic)
    torch.testing.assert_close(
        values_of(policy, rollout)[rollout.response_mask_BT],
        torch.cat(naive(policy, rollout)),
        rtol=1e-4,
        atol=1e-4,
    )
    before = values_of(policy, rollout)
    with policy.adapters.disable_adapter():
        off = values_of(policy, rollout)
    assert torch.equal(off, before) == (kind == "separate")
    kept = policy.trained_state(policy.state_dict())
    assert {key.split(".")[0] for key in kept} == {"network", "critic"}
    assert all("lora_" in key for key in kept if key.startswith("network."))
    own = {key for key in policy.state_dict() if key.startswith("critic.")}
    assert own <= set(kept)
    assert not any("lora_" in key for key in own)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained == set(kept)


@pytest.mark.parametrize("kind", ["linear", "separate"])
def test_over_a_bfloat16_base_the_critic_is_float32(tiny_folder, kind):
    policy, rollout = (
        adapted(tiny_folder, CRITICS[kind](), dtype="bfloat16"),
        make_rollout(PROMPTS, RESPONSES),
    )
    scramble_critic(policy.critic, 0.05)
    assert all(weight.dtype == torch.float32 for weight in policy.parts()["critic"])
    seen = []
    trunk_of(policy).layers[0].mlp.down_proj.register_forward_hook(
        lambda module, ids, out: seen.append(out.dtype)
    )
    values = values_of(policy, rollout)
    assert seen == [torch.bfloat16], "its matrices are multiplied as those of the base"
    assert values.dtype == torch.float32
    values.sum().backward()
    assert all(weight.grad.any() for weight in policy.parts()["critic"])


def test_the_head_is_not_autocast(policy_with_critic):
    """Values in bfloat16 would come in steps of 1/256 of their size."""
    policy, rollout = policy_with_critic("linear", double=False), make_rollout(PROMPTS, RESPONSES)
    with torch.autocast("cpu", torch.bfloat16):
        values = values_of(policy, rollout)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


# --- what is trained, kept and refused ------------------------------------------------------------------------------


def test_parts_come_in_one_order_and_an_unused_one_is_frozen(policy_with_critic):
    policy = policy_with_critic(mtp=ParallelHeads(offsets=2))
    assert list(policy.parts()) == ["policy", "mtp", "critic"]
    groups = parameter_groups(policy, {"critic": 0.5})
    assert [group.get("lr") for group in groups] == [None, None, 0.5]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in policy.critic.parameters()}
    policy.freeze_unused(ScoreRequest(future=2, values=True))
    assert list(policy.parts()) == ["policy", "mtp", "critic"]
    policy.freeze_unused(ScoreRequest(future=2))
    assert list(policy.parts()) == ["policy", "mtp"]
    policy.freeze_unused(ScoreRequest())
    assert list(policy.parts()) == ["policy"]
    with pytest.raises(
        UserError,
        match=r"`learning_rates` names 'critic', which is not trained; there are \['policy'\]",
    ):
        parameter_groups(policy, {"critic": 0.5})


def test_values_without_a_critic_are_refused_before_any_weight_is_loaded(tiny_policy):
    with pytest.raises(
        UserError, match=r"^`ValueLoss` needs `policy.critic`: give `ValueHead`, say"
    ):
        CausalPolicy("nowhere").check(REQUEST)
    for critic in (ValueHead, SeparateCritic):
        with pytest.raises(
            UserError, match=rf"`{critic.__name__}.width` must be at least 1, got 0"
        ):
            critic(width=0)
        with pytest.raises(RuntimeError, match="`build` was not called"):
            critic().values(None, torch.zeros(1, 1), torch.zeros(1, 1))


def test_a_quantised_trunk_is_not_copied(tiny_policy):
    policy = tiny_policy()
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    policy.decoder().layers[0].register_parameter("packed", packed)
    ValueHead().build(policy.decoder())
    with pytest.raises(
        UserError, match="`SeparateCritic` cannot copy a quantised trunk; use `ValueHead`"
    ):
        SeparateCritic().build(policy.decoder())


def save(policy: CausalPolicy, path) -> str:
    state = {
        f"policy.{key}": value for key, value in policy.trained_state(policy.state_dict()).items()
    }
    torch.save({"state_dict": state}, path)
    return str(path)


@each_critic
def test_a_checkpoint_with_a_critic_is_taken(policy_with_critic, tmp_path, kind):
    policy, rollout = policy_with_critic(kind), make_rollout(PROMPTS, RESPONSES)
    again = policy_with_critic(
        kind, fresh=True, seed=4, checkpoint=save(policy, tmp_path / "last.ckpt")
    )
    assert torch.equal(values_of(again, rollout), values_of(policy, rollout))
    assert not again.cold_parts
    assert policy_with_critic(kind).cold_parts == {"critic"}


def test_a_checkpoint_without_a_critic_leaves_it_cold_over_the_checkpoints_own_trunk(
    policy_with_critic, tiny_policy, tmp_path
):
    earlier = tiny_policy(seed=3, double=True)
    for kind in ("linear", "separate"):
        policy = policy_with_critic(
            kind, fresh=True, seed=4, checkpoint=save(earlier, tmp_path / "last.ckpt")
        )
        assert policy.cold_parts == {"critic"}
        assert not values_of(policy, make_rollout(PROMPTS, RESPONSES)).any()
    for name, weight in earlier.decoder().state_dict().items():
        assert torch.equal(policy.critic.trunk.state_dict()[name], weight)


def test_a_separate_critic_takes_the_checkpoints_adapters_in(tiny_folder, tmp_path):
    earlier = CausalPolicy(tiny_folder, lora=Lora(rank=4, alpha=8))
    earlier.build(device=CPU, reference=False)
    scramble_adapters(earlier)
    policy = adapted(
        tiny_folder, SeparateCritic(), move=False, checkpoint=save(earlier, tmp_path / "last.ckpt")
    )
    ids = make_rollout([6], [5]).tokens_BL
    own, trunk, bare = (
        decoder(input_ids=ids, use_cache=False).last_hidden_state
        for decoder in (policy.critic.trunk, policy.decoder(), make_bare(tiny_folder).decoder())
    )
    torch.testing.assert_close(own, trunk, rtol=1e-4, atol=1e-4)
    assert (own - bare).abs().max() > 0.1


def scramble_adapters(policy: CausalPolicy) -> None:
    generator = seeded(6)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def make_bare(folder: str) -> CausalPolicy:
    policy = CausalPolicy(folder)
    policy.build(device=CPU, reference=False)
    return policy


def test_a_critic_of_an_earlier_stage_may_be_left_behind_but_not_be_another(
    policy_with_critic, tiny_policy, tmp_path
):
    path = save(policy_with_critic("hidden"), tmp_path / "last.ckpt")
    assert not tiny_policy(double=True, checkpoint=path).cold_parts
    with pytest.raises(UserError, match="does not fit the policy"):
        policy_with_critic("linear", checkpoint=path)
    with pytest.raises(UserError, match=r"does not fit the policy: .*critic\.trunk"):
        policy_with_critic("separate-hidden", checkpoint=path)
