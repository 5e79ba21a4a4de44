"""Critics against one row at a time; where their gradients go, what they share with the policy, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
from tests.support.builders import make_rollout, relative_error, seeded, subclasses

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
ORDER = [3, 0, 8, 5, 1, 2, 7, 4, 6]
REQUEST = ScoreRequest(values=True)
CPU = torch.device("cpu")
CRITICS = {
    "linear": lambda: ValueHead(),
    "hidden": lambda: ValueHead(width=8),
    "detached": lambda: ValueHead(detach_trunk=True),
    "separate": lambda: SeparateCritic(),
    "separate-hidden": lambda: SeparateCritic(width=8),
}
each_critic = pytest.mark.parametrize("kind", CRITICS)


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    """A model of 32 dimensions would hardly ever share: its attention costs more than its projections."""
    monkeypatch.setattr(
        "lightning_mpo.policies.packing._pays",
        lambda prompt, responses, hidden_size: len(responses) > 1,
    )


def scramble(module: nn.Module, size: float = 0.4) -> None:
    generator = seeded(7)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(
                size
                * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(
                    weight.dtype
                )
            )


@pytest.fixture
def make(tiny_policy):
    """A policy in float64 whose critic has weights that matter."""

    def build(kind="linear", *, fresh=False, **options) -> CausalPolicy:
        policy = tiny_policy(critic=CRITICS[kind](), **({"double": True} | options))
        if not fresh:
            scramble(policy.critic)
        return policy

    return build


def trunk_of(policy: CausalPolicy) -> nn.Module:
    return policy.critic.trunk if isinstance(policy.critic, SeparateCritic) else policy.decoder()


def naive(policy: CausalPolicy, rollout) -> list[Tensor]:
    """Value one row at a time: the states that have read all tokens before the one that is valued."""
    S, rows = rollout.prompt_length, []
    for b in range(len(rollout.group_B)):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        response = rollout.responses_BT[b][rollout.response_mask_BT[b]]
        values = []
        for t in range(len(response)):
            read = torch.cat([prompt, response[:t]])[None]
            hidden = trunk_of(policy)(input_ids=read, use_cache=False).last_hidden_state[0, -1]
            for layer in policy.critic.head:
                hidden = (
                    layer.weight @ hidden + layer.bias
                    if isinstance(layer, nn.Linear)
                    else nn.functional.silu(hidden)
                )
            values.append(hidden[0])
        rows.append(torch.stack(values))
    return rows


def values_of(policy: CausalPolicy, rollout, mask: Tensor | None = None) -> Tensor:
    mask = rollout.response_mask_BT if mask is None else mask
    return policy.score(rollout, mask, temperature=0.7, request=REQUEST).values_BT


def weights_of(policy: CausalPolicy) -> list[Tensor]:
    return [weight for weight in policy.parameters() if weight.requires_grad]


def test_the_list_has_every_critic():
    assert subclasses(Critic) == {type(make()) for make in CRITICS.values()}


# --- values ---------------------------------------------------------------------------------------------------------


@each_critic
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": ORDER, "left": 3, "right": 2}, {"support": 5}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_values_and_gradients_equal_a_loop_over_rows_and_tokens(make, kind, share, options):
    policy, rollout = make(kind, share_prompts=share), make_rollout(PROMPTS, RESPONSES, **options)
    mask = rollout.response_mask_BT
    values = values_of(policy, rollout)
    expected = torch.cat(naive(policy, rollout))
    torch.testing.assert_close(values[mask], expected, rtol=1e-6, atol=1e-6)
    assert values[mask].std() > 0.1
    assert not values[~mask].any()
    if kind == "detached":
        return
    weight = torch.randn(len(expected), generator=seeded(3), dtype=torch.float64)
    own, loop = (
        torch.autograd.grad((weight * part).sum(), weights_of(policy), allow_unused=True)
        for part in (values[mask], expected)
    )
    for value, wanted in zip(own, loop, strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            assert relative_error(value, wanted) < 1e-6


@each_critic
def test_values_start_at_zero(make, kind):
    assert not values_of(make(kind, fresh=True), make_rollout(PROMPTS, RESPONSES)).any()


@each_critic
def test_only_the_tokens_asked_for_are_valued(make, kind):
    policy, rollout = make(kind), make_rollout(PROMPTS, RESPONSES)
    mask = rollout.response_mask_BT & (
        torch.rand(rollout.response_mask_BT.shape, generator=seeded(1)) < 0.5
    )
    mask[0] = False
    torch.testing.assert_close(values_of(policy, rollout, mask), values_of(policy, rollout) * mask)
    assert policy.score(rollout, mask, temperature=1.0).values_BT is None


@each_critic
def test_log_probs_are_the_same_with_values(make, kind):
    policy, rollout = make(kind), make_rollout(PROMPTS, RESPONSES)
    mask = rollout.response_mask_BT
    with_values, without = (
        policy.score(rollout, mask, temperature=0.7, request=request)
        for request in (REQUEST, ScoreRequest())
    )
    assert torch.equal(with_values.logprobs_BT, without.logprobs_BT)


@pytest.mark.parametrize("family", [None, ParallelHeads])
def test_values_beside_multi_token_heads(make, family):
    heads = None if family is None else family(offsets=2)
    policy, rollout = make(mtp=heads), make_rollout(PROMPTS, RESPONSES)
    request = ScoreRequest(values=True, future=2 if family else 0)
    values = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=request
    ).values_BT
    torch.testing.assert_close(values[rollout.response_mask_BT], torch.cat(naive(policy, rollout)))


# --- gradients ------------------------------------------------------------------------------------------------------


@each_critic
def test_gradients_go_where_they_are_told(make, kind):
    """Into the trunk from a head on it, unless detached; never from a critic of its own."""
    policy, rollout = make(kind), make_rollout(PROMPTS, RESPONSES)
    values_of(policy, rollout).sum().backward()
    reached = {
        part: [weight.grad is not None and bool(weight.grad.any()) for weight in weights]
        for part, weights in policy.parts().items()
    }
    assert set(reached) == {"policy", "critic"}
    assert all(reached["critic"])
    assert all(reached["policy"]) == any(reached["policy"]) == (kind in ("linear", "hidden"))


@each_critic
def test_nothing_to_value_still_reaches_every_weight_of_the_critic(make, kind):
    """An empty micro-batch takes part in the backward pass, at gradient 0: DDP waits for it."""
    policy, rollout = make(kind), make_rollout(PROMPTS, RESPONSES)
    values_of(policy, rollout, torch.zeros_like(rollout.response_mask_BT)).sum().backward()
    assert all(
        weight.grad is not None and not weight.grad.any() for weight in policy.parts()["critic"]
    )


def test_checkpointing_recomputes_and_changes_no_gradient(tiny_policy):
    rollout = make_rollout(PROMPTS, RESPONSES)
    gradients, calls = [], []
    for flag in (False, True):
        policy = tiny_policy(critic=SeparateCritic(checkpointing=flag), double=True)
        scramble(policy.critic)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        policy.critic.trunk.layers[0].self_attn.register_forward_pre_hook(count)
        values_of(policy, rollout).sum().backward()
        gradients.append([weight.grad for weight in policy.parts()["critic"]])
    assert calls == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


# --- a critic of its own --------------------------------------------------------------------------------------------


def test_a_separate_critic_starts_as_the_trunk_and_shares_nothing(make):
    policy, rollout = make("separate", fresh=True), make_rollout(PROMPTS, RESPONSES)
    own, trunk = policy.critic.trunk.state_dict(), policy.decoder().state_dict()
    assert own.keys() == trunk.keys()
    for name, weight in trunk.items():
        assert torch.equal(own[name], weight)
        assert own[name].data_ptr() != weight.data_ptr()
    scramble(policy.critic)
    before = values_of(policy, rollout)
    logprobs = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
    scramble(policy.network)
    assert torch.equal(values_of(policy, rollout), before)
    assert not torch.equal(
        policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT, logprobs
    )
    assert not torch.equal(values_of(make("linear"), rollout), before)


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
    scramble(policy.critic)
    torch.testing.assert_close(
        values_of(policy, rollout)[rollout.response_mask_BT],
        torch.cat(naive(policy, rollout)),
        rtol=1e-4,
        atol=1e-4,
    )
    before = values_of(policy, rollout)
    with policy._adapters.disable_adapter():
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
    scramble(policy.critic, 0.05)
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


def test_the_head_is_not_autocast(make):
    """Values in bfloat16 would come in steps of 1/256 of their size."""
    policy, rollout = make("linear", double=False), make_rollout(PROMPTS, RESPONSES)
    with torch.autocast("cpu", torch.bfloat16):
        values = values_of(policy, rollout)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


# --- what is trained, kept and refused ------------------------------------------------------------------------------


def test_parts_come_in_one_order_and_an_unused_one_is_frozen(make):
    policy = make(mtp=ParallelHeads(offsets=2))
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
        UserError, match=r"^`objective.critic` needs `policy.critic`: give `ValueHead`, say"
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
def test_a_checkpoint_with_a_critic_is_taken(make, tmp_path, kind):
    policy, rollout = make(kind), make_rollout(PROMPTS, RESPONSES)
    again = make(kind, fresh=True, seed=4, checkpoint=save(policy, tmp_path / "last.ckpt"))
    assert torch.equal(values_of(again, rollout), values_of(policy, rollout))
    assert not again.cold_parts
    assert make(kind).cold_parts == {"critic"}


def test_a_checkpoint_without_a_critic_leaves_it_cold_over_the_checkpoints_own_trunk(
    make, tiny_policy, tmp_path
):
    earlier = tiny_policy(seed=3, double=True)
    for kind in ("linear", "separate"):
        policy = make(kind, fresh=True, seed=4, checkpoint=save(earlier, tmp_path / "last.ckpt"))
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
    make, tiny_policy, tmp_path
):
    path = save(make("hidden"), tmp_path / "last.ckpt")
    assert not tiny_policy(double=True, checkpoint=path).cold_parts
    with pytest.raises(UserError, match="does not fit the policy"):
        make("linear", checkpoint=path)
    with pytest.raises(UserError, match=r"does not fit the policy: .*critic\.trunk"):
        make("separate-hidden", checkpoint=path)
