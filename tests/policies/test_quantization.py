"""QLoRA with the real bitsandbytes on the CPU: likelihood, gradients around rollouts, training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.policies import (
    Lora,
    MedusaHeads,
    ParallelHeads,
    Quantization,
    ValueHead,
    checksums,
    quantization,
    rollout_mode,
)
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_prompts, make_rollout, naive_logprobs, seeded
from tests.support.quantized import built, unbuilt
from tests.support.runs import adam, fit, same

PACKS = "avx512_bf16"
"""What a CPU must have for bitsandbytes to repack."""


def cpu_repacks() -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return PACKS in info.read()
    except OSError:
        return False


# --- what is stored -------------------------------------------------------------------------------------------------


def test_the_trunk_is_in_four_bits_and_embedding_and_head_are_not(four_bit_folder):
    policy = built(four_bit_folder, dtype="bfloat16", quantization=Quantization())
    network = policy.network
    projections = [m for name, m in network.named_modules() if name.endswith("base_layer")]
    assert len(projections) == 14
    assert all(m.weight.dtype == torch.uint8 for m in projections)
    assert network.get_input_embeddings().weight.dtype == torch.bfloat16
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    trained = [(n, p.dtype) for n, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and dtype == torch.float32 for name, dtype in trained)
    for double, expected in ((True, 0.5 + 1 / 64 + 4 / 64 / 256), (False, 0.5 + 4 / 64)):
        layer = (
            built(four_bit_folder, quantization=Quantization(double=double))
            .network.model.layers[0]
            .mlp.up_proj.base_layer
        )
        held = sum(
            t.numel() * t.element_size()
            for n, t in checksums.quantised_tensors(layer)
            if not n.endswith("code")
        )
        assert Quantization(double=double).bytes_per_weight() == expected
        assert held / layer.weight.quant_state.shape.numel() == pytest.approx(expected, rel=0.05)


# --- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"support": 5}], ids=["full", "support"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["trunk", "head"])
def test_scores_equal_plain_transformers_row_by_row(four_bit_folder, options, targets):
    policy = built(four_bit_folder, lora=Lora(rank=4, alpha=8, targets=targets))
    rollout = make_rollout([6, 9, 4], [5, 1, 3, 2, 1, 7], **options)
    mask = rollout.response_mask_BT
    with rollout_mode(policy):
        scores = policy.score(rollout, mask, temperature=0.7)
        logprobs, entropies = naive_logprobs(policy.network, rollout, temperature=0.7)
    torch.testing.assert_close(scores.logprobs_BT[mask], torch.cat(logprobs), rtol=0, atol=2e-4)
    torch.testing.assert_close(scores.entropy_BT[mask], torch.cat(entropies), rtol=0, atol=2e-4)


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4)])
def test_sampler_and_trainer_agree(four_bit_folder, support):
    policy = built(four_bit_folder)
    rollout = LocalSampler().sample(
        policy, make_prompts([4, 6]), 3, SamplingRequest(support, 0.9, 6), generator=seeded(0)
    )
    assert check_parity(policy, rollout, temperature=0.9, exact=True).max < 1e-3


def test_the_reference_is_the_base_with_adapters_off(four_bit_folder):
    start, policy = built(four_bit_folder, perturb=False), built(four_bit_folder)
    rollout = make_rollout([6, 9], [5, 1, 3, 2])
    mask = rollout.response_mask_BT
    with torch.no_grad():
        initial = start.score(rollout, mask, temperature=1.0).logprobs_BT
        assert torch.equal(
            policy.score(rollout, mask, temperature=1.0, reference=True).logprobs_BT, initial
        )
        assert not torch.allclose(
            policy.score(rollout, mask, temperature=1.0).logprobs_BT, initial, atol=1e-2
        )
    assert policy.reference_network is None


@pytest.mark.parametrize(
    "options", [{"mtp": ParallelHeads()}, {"mtp": MedusaHeads()}, {"critic": ValueHead()}]
)
def test_heads_and_a_value_head_stand_on_a_quantised_trunk(four_bit_folder, options):
    policy = built(four_bit_folder, **options)
    rollout = make_rollout([6, 9], [5, 4, 3, 2])
    request = ScoreRequest(future=2 if "mtp" in options else 0, values="critic" in options)
    policy.check(request)
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=request)
    said = scores.future_BTM if "mtp" in options else scores.values_BT
    (said.sum() + scores.logprobs_BT.sum()).backward()
    part = policy.parts()["mtp" if "mtp" in options else "critic"]
    assert any(weight.grad is not None and weight.grad.any() for weight in part)


# --- gradients around rollouts --------------------------------------------------------------------------------------


def test_gradients_are_the_same_before_and_after_a_rollout(four_bit_folder):
    """Without `keep_layout`, bitsandbytes 0.50 repacks the weights in the rollout, and gradients are wrong from then on."""
    policy = built(four_bit_folder)
    rollout = make_rollout([6, 9], [5, 1, 3, 2])

    def gradients() -> torch.Tensor:
        policy.zero_grad()
        policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0
        ).logprobs_BT.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    before, moved = gradients(), checksums.checksums(policy.network)
    with rollout_mode(policy):
        policy.score(rollout, rollout.response_mask_BT, temperature=1.0)
    LocalSampler().sample(
        policy,
        make_prompts([4, 6]),
        2,
        SamplingRequest(FullVocabulary(), 1.0, 3),
        generator=seeded(0),
    )
    policy.state_dict()
    checksums.check_moved(policy.network, moved)
    torch.testing.assert_close(gradients(), before, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not cpu_repacks(), reason="this CPU has no AVX512-BF16, so that bitsandbytes repacks nothing"
)
def test_a_kernel_that_repacks_is_found_before_the_first_update(four_bit_folder, monkeypatch):
    monkeypatch.setattr(quantization, "keep_layout", lambda network: None)
    with pytest.raises(
        UserError, match=r"gradients of the quantised policy change with a rollout .* repacked"
    ):
        built(four_bit_folder, quantization=Quantization())


@pytest.mark.parametrize("broken", ["direction", "size"])
def test_gradients_that_a_rollout_changes_are_refused(four_bit_folder, monkeypatch, broken):
    """On any machine: the second gradient is bent as a wrong kernel would bend it."""
    own, calls = quantization._gradients, []

    def bent(network):
        found = own(network)
        calls.append(found)
        if len(calls) == 1:
            return found
        return found.roll(1) if broken == "direction" else 0.9 * found

    monkeypatch.setattr(quantization, "_gradients", bent)
    with pytest.raises(UserError, match="before|repacked"):
        built(four_bit_folder)
    assert len(calls) == 2


def test_activations_are_recomputed_in_updates_and_not_in_rollouts(four_bit_folder):
    policy = built(four_bit_folder, gradient_checkpointing=True)
    calls = []
    policy.network.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    rollout = make_rollout([6, 9], [5, 1, 3, 2])
    for _ in range(2):  # before and after a rollout
        calls.clear()
        loss = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT.sum()
        assert len(calls) == 1
        loss.backward()
        assert len(calls) == 2
        calls.clear()
        LocalSampler().sample(
            policy, make_prompts([4, 6]), 2, SamplingRequest(FullVocabulary(), 1.0, 4),
            generator=seeded(0),
        )  # fmt: skip
        assert 1 <= len(calls) <= 4
        assert not any(calls)


# --- training -------------------------------------------------------------------------------------------------------


def test_a_run_trains_adapters_alone_and_resumes_to_the_bit(four_bit_folder, tmp_path):
    def options():
        torch.manual_seed(0)  # adapters start at random
        return {
            "module": {"optimizer": adam(1e-2)},
            "policy": unbuilt(four_bit_folder),
            "log_every_n_steps": 1,
        }

    whole = fit(tmp_path / "whole", max_steps=4, **options())
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, every_n_train_steps=2)
    part = fit(tmp_path / "part", max_steps=2, callbacks=[keep], **options())
    base = {n: p for n, p in part.module.policy.named_parameters() if not p.requires_grad}
    assert base
    assert all(
        torch.equal(p, dict(whole.module.policy.named_parameters())[n]) for n, p in base.items()
    )
    checkpoint = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    again = fit(
        tmp_path / "again", max_steps=4, ckpt_path=str(tmp_path / "kept" / "last.ckpt"), **options()
    )
    assert same(again.weights, whole.weights)
    assert not same(part.weights, whole.weights)


def test_adapters_of_a_checkpoint_are_taken(four_bit_folder, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    run = fit(
        tmp_path,
        max_steps=1,
        callbacks=[keep],
        policy=unbuilt(four_bit_folder),
        module={"optimizer": adam(1e-2)},
    )
    policy = built(four_bit_folder, perturb=False, checkpoint=str(tmp_path / "last.ckpt"))
    assert same(dict(policy.named_parameters()), run.weights)
