"""Families of masked language models: positions, masks and heads, adapters and checkpoints."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import Lora, MaskedPolicy, Quantization
from lightning_mpo.policies.masked_inputs import MaskForm
from lightning_mpo.types import take_rows
from tests.support.adapters import save
from tests.support.builders import seeded
from tests.support.masked import masked_rollout, naive_score
from tests.support.masked_folders import FAMILIES

CPU = torch.device("cpu")
LORA = Lora(rank=4, alpha=8)


def built(folder, *, reference=False, **options) -> MaskedPolicy:
    policy = MaskedPolicy(folder, **options)
    policy.check()
    assert policy.network is None
    policy.build(device=CPU, reference=reference)
    return policy


def move_adapters(policy):
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=seeded(1))


def logprobs(policy, rollout, **options):
    mask_BT = rollout.response_mask_BT
    with torch.no_grad():
        return policy.score(rollout, mask_BT, temperature=1.0, **options).logprobs_BT


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_unpadded_rows(masked_folder, family):
    policy, rollout = built(masked_folder(family)), masked_rollout(left=3)
    assert policy.mask_id == 2
    assert policy.barred == (0, 2)
    expected, _ = naive_score(policy, rollout, network=policy.network.eval())
    policy.train()  # dropouts are 0
    torch.testing.assert_close(logprobs(policy, rollout).double(), expected, atol=1e-3, rtol=1e-3)
    # another bias of the head is another score
    bias = {"bert": "cls.predictions.bias", "esm": "lm_head.bias"}.get(family)
    if bias is not None:
        with torch.no_grad():
            policy.network.get_parameter(bias)[5:9].add_(2)
        changed, _ = naive_score(policy, rollout)
        assert not torch.allclose(changed, expected, atol=1e-2)
        torch.testing.assert_close(
            logprobs(policy, rollout).double(), changed, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_reaches_every_weight(masked_folder, family):
    policy = built(masked_folder(family), gradient_checkpointing=True)
    plain, rollout = built(masked_folder(family)), masked_rollout()
    for each in (policy, plain):
        scores = each.score(rollout, rollout.response_mask_BT, temperature=1.0)
        scores.logprobs_BT.sum().backward()
    for (name, weight), other in zip(policy.named_parameters(), plain.parameters(), strict=True):
        # ESM's head for contacts takes no part
        assert weight.requires_grad == ("contact_head" not in name)
        if not weight.requires_grad:
            continue
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_positions_of_roberta_begin_behind_its_padding(masked_folder):
    assert built(masked_folder("roberta")).positions == 39
    assert built(masked_folder("bert")).positions == 40


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_adapters_are_trained_and_the_base_is_the_reference(masked_folder, family, tmp_path):
    rollout = masked_rollout()
    policy = built(masked_folder(family), lora=LORA, reference=True)
    base = logprobs(built(masked_folder(family)), rollout)
    torch.testing.assert_close(logprobs(policy, rollout), base, atol=1e-5, rtol=1e-5)
    move_adapters(policy)
    moved = logprobs(policy, rollout)
    assert not torch.allclose(moved, base, atol=1e-3)
    torch.testing.assert_close(
        logprobs(policy, rollout, reference=True), base, atol=1e-5, rtol=1e-5
    )
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained == set(policy.trained_state(policy.state_dict()))
    assert all("lora_" in name for name in trained)
    # a checkpoint, whose adapters are the reference of the next stage
    save(policy, str(tmp_path / "last.ckpt"))
    again = built(
        masked_folder(family), lora=LORA, checkpoint=str(tmp_path / "last.ckpt"), reference=True
    )
    for reference in (False, True):
        torch.testing.assert_close(logprobs(again, rollout, reference=reference), moved)


def test_all_weights_come_back_from_a_checkpoint(tiny_masked, tmp_path):
    rollout, path = masked_rollout(), str(tmp_path / "last.ckpt")
    policy = tiny_masked(seed=3)
    save(policy, path)
    again = tiny_masked(seed=4, checkpoint=path, reference=True)
    for reference in (False, True):
        value = logprobs(again, rollout, reference=reference)
        torch.testing.assert_close(value, logprobs(policy, rollout), rtol=0, atol=0)


def test_an_adapter_on_the_head_is_scored(masked_folder):
    policy = built(masked_folder("bert"), lora=Lora(rank=4, alpha=8, targets=["decoder", "query"]))
    move_adapters(policy)
    rollout = masked_rollout()
    expected, _ = naive_score(policy, rollout)
    torch.testing.assert_close(logprobs(policy, rollout).double(), expected, atol=1e-3, rtol=1e-3)


def test_names_of_no_layer_are_refused_before_weights_load(masked_folder):
    policy = MaskedPolicy(masked_folder("bert"), lora=Lora(targets=["q_proj"]))
    with pytest.raises(UserError, match=r"`lora.targets` names no linear layer: \['q_proj'\]"):
        policy.check()


def test_a_base_in_four_bits(masked_folder):
    exact = Quantization(compute_dtype="float32")
    policy = built(masked_folder("bert"), lora=LORA, quantization=exact, reference=True)
    kinds = {weight.dtype for weight in policy.network.bert.parameters()}
    assert torch.uint8 in kinds
    rollout, base = masked_rollout(), None
    base = logprobs(policy, rollout)
    expected, _ = naive_score(policy, rollout)
    torch.testing.assert_close(base.double(), expected, atol=1e-2, rtol=1e-2)
    move_adapters(policy)
    assert not torch.allclose(logprobs(policy, rollout), base, atol=1e-3)
    torch.testing.assert_close(
        logprobs(policy, rollout, reference=True), base, atol=1e-3, rtol=1e-3
    )


# --- code of repositories -------------------------------------------------------------------------


@pytest.mark.parametrize("takes", ["keys", "pairs", "none"])
def test_code_of_a_repository_runs_by_choice(masked_folder, code_cache, takes):
    policy = built(masked_folder(f"foreign-{takes}"), remote_code=True)
    assert policy._inputs.form is MaskForm[takes.upper()]
    assert sum("code       of the model's repository runs" in line for line in policy.remarks) == 1
    # two rows of one length before one of another
    rollout = take_rows(masked_rollout(left=3), torch.tensor([0, 1, 2]))
    expected, _ = naive_score(policy, rollout)
    torch.testing.assert_close(logprobs(policy, rollout).double(), expected, atol=1e-4, rtol=1e-4)


def test_code_of_a_repository_that_is_causal_is_refused(masked_folder, code_cache):
    with pytest.raises(UserError, match="its first token does not attend to the last one"):
        built(masked_folder("foreign-causal"), remote_code=True)


def test_code_of_a_repository_does_not_run_unasked(masked_folder):
    with pytest.raises(UserError, match="runs only with `policy.remote_code: true`"):
        MaskedPolicy(masked_folder("foreign-keys")).check()
