"""Scoring against plain transformers, one row at a time; LoRA, checkpoints, and the modes of a rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy, Lora, TinyPolicy, rollout_mode
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import take_rows
from tests.conftest import CHARACTERS
from tests.support.builders import (
    VOCABULARY,
    make_prompts,
    make_rollout,
    naive_logprobs,
    relative_error,
    seeded,
)

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
ORDER = [3, 0, 8, 5, 1, 2, 7, 4, 6]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def double(tiny_policy):
    """One policy in float64 that shares prompts wherever it may, one that never does."""
    return {share: tiny_policy(double=True, share_prompts=share) for share in (True, False)}


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    """A model of 32 dimensions would hardly ever share: its attention costs more than its projections."""
    monkeypatch.setattr(
        "lightning_mpo.policies.packing._pays",
        lambda prompt, responses, hidden_size: len(responses) > 1,
    )


def gradients(policy: CausalPolicy, loss: Tensor) -> list[Tensor]:
    weights = [p for p in policy.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


# --- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": ORDER},
        {"order": ORDER, "left": 3, "right": 2},
        {"support": 5},
        {"support": 6, "slots": True, "order": ORDER, "right": 1},
        {"support": VOCABULARY},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_scores_and_gradients_equal_plain_transformers_row_by_row(
    double, options, temperature, share
):
    policy, rollout = double[share], make_rollout(PROMPTS, RESPONSES, **options)
    mask = rollout.response_mask_BT
    scores = policy.score(
        rollout, mask, temperature=temperature, request=ScoreRequest(entropy_grad=True)
    )
    logprobs, entropies = naive_logprobs(policy.network, rollout, temperature=temperature)
    torch.testing.assert_close(scores.logprobs_BT[mask].double(), flat(logprobs), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropy_BT[mask].double(), flat(entropies), rtol=0, atol=1e-5)
    assert not scores.logprobs_BT[~mask].any()
    assert not scores.entropy_BT[~mask].any()
    weights = torch.randn(2, int(mask.sum()), generator=seeded(3), dtype=torch.float64)
    own = (weights[0] * scores.logprobs_BT[mask]).sum() + (
        weights[1] * scores.entropy_BT[mask]
    ).sum()
    naive = (weights[0] * flat(logprobs)).sum() + (weights[1] * flat(entropies)).sum()
    for value, expected in zip(gradients(policy, own), gradients(policy, naive), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_a_support_of_the_whole_vocabulary_is_the_full_softmax(double):
    """A support of the whole vocabulary: docs/algorithms.md 16.2, invariant 2."""
    full = make_rollout(PROMPTS, RESPONSES)
    whole = make_rollout(PROMPTS, RESPONSES, support=VOCABULARY)
    assert torch.equal(full.tokens_BL, whole.tokens_BL)
    one, other = (double[True].score(r, r.response_mask_BT, temperature=0.8) for r in (full, whole))
    torch.testing.assert_close(one.logprobs_BT, other.logprobs_BT, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.entropy_BT, other.entropy_BT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("support", [None, 5])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
def test_only_the_tokens_asked_for_are_scored(double, share, support):
    policy, rollout = double[share], make_rollout(PROMPTS, RESPONSES, support=support)
    mask = rollout.response_mask_BT & (
        torch.rand(rollout.response_mask_BT.shape, generator=seeded(1)) < 0.5
    )
    mask[0] = False
    every = policy.score(rollout, rollout.response_mask_BT, temperature=1.0)
    some = policy.score(rollout, mask, temperature=1.0)
    torch.testing.assert_close(some.logprobs_BT, every.logprobs_BT * mask, rtol=0, atol=1e-6)
    torch.testing.assert_close(some.entropy_BT, every.entropy_BT * mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("support", [None, 5])
def test_nothing_to_score_is_scored_as_nothing(double, support):
    """An empty micro-batch still takes part in the backward pass, at gradient 0."""
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    scores = double[True].score(
        rollout, torch.zeros_like(rollout.response_mask_BT), temperature=1.0
    )
    assert not scores.logprobs_BT.any()
    assert not any(gradient.any() for gradient in gradients(double[True], scores.logprobs_BT.sum()))


@pytest.mark.parametrize("support", [None, 5])
def test_entropy_carries_gradient_only_if_asked(double, support):
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    policy, mask = double[True], rollout.response_mask_BT
    assert not policy.score(rollout, mask, temperature=1.0).entropy_BT.requires_grad
    assert policy.score(
        rollout, mask, temperature=1.0, request=ScoreRequest(entropy_grad=True)
    ).entropy_BT.requires_grad
    with torch.no_grad():
        assert not policy.score(rollout, mask, temperature=1.0).logprobs_BT.requires_grad


def test_sharing_is_for_plain_attention_only(tiny_policy):
    assert tiny_policy()._can_share
    assert not tiny_policy(share_prompts=False)._can_share

    def window(policy):
        policy.config.sliding_window = 4

    def eager(policy):
        policy.config._attn_implementation = "eager"

    assert not tiny_policy(prepare=window)._can_share
    assert not tiny_policy(prepare=eager)._can_share


# --- reference and LoRA ---------------------------------------------------------------------------------------------


def lora_policy(folder: str, **options) -> CausalPolicy:
    policy = CausalPolicy(folder, lora=Lora(rank=4, alpha=8), **options)
    torch.manual_seed(5)
    policy.build(device=CPU, reference=True)
    return policy


def move_adapters(policy: CausalPolicy) -> None:
    g = seeded(6)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=g))


def score(policy: CausalPolicy, rollout, **options) -> Tensor:
    with torch.no_grad():
        return policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0, **options
        ).logprobs_BT


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


# --- gradient checkpointing and modes -------------------------------------------------------------------------------


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


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save(policy: CausalPolicy, path) -> None:
    state = {
        f"policy.{key}": value for key, value in policy.trained_state(policy.state_dict()).items()
    }
    torch.save({"state_dict": state | {"metric": torch.zeros(1)}}, path)


def test_what_is_trained_is_saved_and_comes_back(tiny_policy, tiny_folder, tmp_path):
    rollout, path = make_rollout(PROMPTS, RESPONSES), str(tmp_path / "last.ckpt")
    policy = tiny_policy(seed=3, reference=True)
    assert {key.split(".")[0] for key in policy.trained_state(policy.state_dict())} == {"network"}
    save(policy, path)
    loaded = tiny_policy(seed=4, reference=True, checkpoint=path)
    loaded.check()
    torch.testing.assert_close(score(loaded, rollout), score(policy, rollout), rtol=0, atol=0)
    torch.testing.assert_close(
        score(loaded, rollout, reference=True), score(policy, rollout), rtol=0, atol=0
    )

    adapted = lora_policy(tiny_folder)
    move_adapters(adapted)
    state = adapted.trained_state(adapted.state_dict())
    assert state
    assert set(state) == {name for name, p in adapted.named_parameters() if p.requires_grad}
    save(adapted, path)
    again = CausalPolicy(tiny_folder, lora=Lora(rank=4, alpha=8), checkpoint=path)
    again.build(device=CPU, reference=True)
    torch.testing.assert_close(score(again, rollout), score(adapted, rollout), rtol=0, atol=0)


def broken(kind: str, path, tiny_policy) -> None:
    """Write a checkpoint that is wrong in one way."""
    policy = tiny_policy()
    state = {f"policy.{key}": value for key, value in policy.state_dict().items()}
    if kind == "no checkpoint":
        path.write_text("hello")
    elif kind == "another file":
        torch.save({"weights": state}, path)
    elif kind == "no mapping":
        torch.save({"state_dict": 3}, path)
    elif kind == "missing":
        state.pop("policy.network.model.norm.weight")
        torch.save({"state_dict": state}, path)
    elif kind == "unknown":
        torch.save({"state_dict": state | {"policy.network.extra": torch.zeros(1)}}, path)
    elif kind == "shape":
        save(tiny_policy(hidden_size=64), path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "does not exist"),
        ("no checkpoint", "cannot be read as a Lightning checkpoint"),
        ("another file", "cannot be read as a Lightning checkpoint: it holds no state_dict"),
        ("no mapping", "cannot be read as a Lightning checkpoint"),
        (
            "missing",
            r"does not fit the policy: 1 weights are missing, 0 unknown .*model.norm.weight",
        ),
        ("unknown", r"does not fit the policy: 0 weights are missing, 1 unknown .*network.extra"),
        ("shape", r"does not fit the policy: .* has shape \[.*64\], the policy needs \[.*32\]"),
    ],
)
def test_a_checkpoint_that_does_not_serve_is_one_clear_sentence(
    tiny_policy, tmp_path, kind, message
):
    path = tmp_path / "last.ckpt"
    broken(kind, path, tiny_policy)
    policy = TinyPolicy(CHARACTERS, hidden_size=32, layers=2, heads=2, checkpoint=str(path))

    def take() -> None:
        policy.check()
        policy.build(device=CPU, reference=False)

    with pytest.raises(UserError, match=rf"^`policy.checkpoint` '{path}' {message}") as caught:
        take()
    assert "\n" not in str(caught.value)


def test_a_micro_batch_may_be_any_rows_of_a_rollout(double):
    rollout = make_rollout(PROMPTS, RESPONSES, order=ORDER)
    every = score(double[True], rollout)
    for rows in ([0], [4, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        index = torch.tensor(rows)
        torch.testing.assert_close(
            score(double[True], take_rows(rollout, index)), every[index], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("options", [{}, {"support": 6, "slots": True}], ids=["full", "support"])
def test_candidates_are_scored_where_they_were_recorded_and_cost_no_gradient(
    double, options, share
):
    """Any rows, any padding, any mask; slots without an id are -inf, and so are masked places."""
    policy, request = double[share], ScoreRequest(candidates=True)
    plain = make_rollout(PROMPTS, RESPONSES, order=ORDER, right=2, left=1, **options)
    mask = plain.response_mask_BT
    g = seeded(5)
    recorded = -torch.rand(*mask.shape, 4, generator=g)
    recorded = recorded.masked_fill(torch.rand(recorded.shape, generator=g) < 0.3, -torch.inf)
    pool = (
        torch.rand(*mask.shape, VOCABULARY, generator=g).argsort(-1)
        if not options
        else plain.support_BTK
    )
    wild = torch.where(
        recorded > -torch.inf, pool[..., :4], 10**6
    ).int()  # ids of empty slots are never read
    rollout = replace(plain, candidates_BTK=wild, candidate_logprobs_BTK=recorded)
    some = mask & (torch.rand(mask.shape, generator=g) < 0.7)
    scores = policy.score(rollout, some, temperature=0.7, request=request)
    for b, t, k in (recorded > -2).nonzero().tolist():
        found = scores.candidate_logprobs_BTK[b, t, k].item()
        if not some[b, t] or recorded[b, t, k] == -torch.inf:
            assert found == -float("inf")
            continue
        length = int(mask[b, :t].sum())
        prompt = rollout.tokens_BL[b, : rollout.prompt_length][
            rollout.attention_mask_BL[b, : rollout.prompt_length]
        ]
        text = torch.cat([prompt, rollout.responses_BT[b, :length]])
        with torch.no_grad():
            logits = policy.network(input_ids=text[None], use_cache=False).logits[0, -1] / 0.7
        if options:
            held = rollout.support_BTK[b, t][rollout.support_mask_BTK[b, t]].long()
            barred = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, held, False)
            logits = logits.masked_fill(barred, -torch.inf)
        assert found == pytest.approx(logits.log_softmax(0)[wild[b, t, k]].item(), abs=1e-6)
    assert (scores.candidate_logprobs_BTK[recorded == -torch.inf] == -torch.inf).all()
    without = policy.score(rollout, some, temperature=0.7)
    assert without.candidate_logprobs_BTK is None
    assert torch.equal(scores.logprobs_BT, without.logprobs_BT)
    pairs = zip(*(gradients(policy, s.logprobs_BT.sum()) for s in (scores, without)), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)
    index = torch.tensor([4, 2])
    part = policy.score(take_rows(rollout, index), some[index], temperature=0.7, request=request)
    torch.testing.assert_close(
        part.candidate_logprobs_BTK, scores.candidate_logprobs_BTK[index], rtol=0, atol=1e-6
    )
    with pytest.raises(UserError, match="the rollout records no candidates"):
        policy.score(plain, mask, temperature=0.7, request=request)


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
