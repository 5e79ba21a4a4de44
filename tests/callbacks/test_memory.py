"""Peaks by phase, the saving of weights, the canary, and what is written."""

from __future__ import annotations

import json
import time

import pytest
import torch

from lightning_mpo.callbacks import MemoryAccounting
from lightning_mpo.callbacks.memory import PHASES
from lightning_mpo.errors import UserError
from lightning_mpo.memory.drawing import parts_of
from lightning_mpo.memory.footprint import Footprint, footprint
from lightning_mpo.memory.resident import PhasePeaks, _find_mallinfo, heap_free_bytes
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.policies import CausalPolicy, Lora, Quantization
from tests.support.quantized import built
from tests.support.runs import fit, make_policy

WORK = 96 * 2**20


def let_it_read(watch: PhasePeaks) -> None:
    """Wait until the watching thread has read everything, however busy the machine is."""
    read, readings = watch.read, []

    def counted() -> int:
        readings.append(read())
        return readings[-1]

    watch.read = counted
    while len(readings) < 2 * watch.heap_every:
        time.sleep(0.002)
    watch.read = read


class Works(RolloutCallback):
    """Holds memory in one phase until it was seen; put it behind the accounting."""

    def __init__(self, hook: str, memory: MemoryAccounting) -> None:
        setattr(self, hook, self.work)
        self.memory = memory

    def work(self, *args, **kwargs):
        block = torch.ones(WORK, dtype=torch.uint8)
        let_it_read(self.memory.watch)
        del block


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("on_rollout_tokens", "rollout"),
        ("on_rollout_sampled", "score"),
        ("on_before_backward", "backward"),
        ("on_before_optimizer_step", "optimiser"),
    ],
)
def test_a_peak_belongs_to_the_phase_it_was_in(tmp_path, hook, phase):
    memory = MemoryAccounting()
    fit(
        tmp_path,
        callbacks=[memory, Works(hook, memory)],
        max_steps=2,
        rollout={"minibatches": 2, "parity_gate": False},
    )
    peaks = memory.peaks()
    assert list(peaks) == list(PHASES)
    others = [size for name, size in peaks.items() if name != phase]
    # half-way between a peak in this phase and one in another: resident memory wanders by tens of MB between phases
    assert peaks[phase] > max(others) + 0.5 * WORK
    assert memory.watch.phase is None


def test_what_a_run_logs_and_writes(tmp_path):
    memory = MemoryAccounting()
    run = fit(tmp_path, callbacks=[memory], max_steps=4, rollout={"minibatches": 2})
    assert {f"memory/{phase}{kind}_mib" for phase in PHASES for kind in ("", "_in_use")} <= set(
        run.record.lines[-1][1]
    )
    assert run.record.column("memory/peak_mib")[-1] == pytest.approx(
        max(memory.peaks().values()) / 2**20, rel=0.2
    )
    weights = sum(p.numel() for p in run.module.policy.parameters())
    assert run.record.column("memory/weights_mib")[0] == weights * 4 / 2**20
    assert (
        run.record.column("memory/of_bf16_pair")[0] == 1.0
    )  # float32 policy, no reference: as much as a bf16 pair
    summary = json.loads((tmp_path / "memory.json").read_text())
    assert list(summary["peaks"]) == list(PHASES)
    assert all(0 < peak["in_use"] <= peak["resident"] for peak in summary["peaks"].values())
    assert summary["gradients"] == weights * 4
    assert summary["optimiser"] == pytest.approx(weights * 8, rel=0.01)
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_a_measurement_alone_writes_nothing(tmp_path):
    memory = MemoryAccounting(write=False)
    fit(tmp_path, callbacks=[memory], max_steps=1)
    assert list(memory.peaks()) == list(PHASES)
    assert not list(tmp_path.glob("memory.*"))


@pytest.mark.skipif(
    _find_mallinfo() is None, reason="the C library does not tell what its heap keeps"
)
def test_what_the_heap_keeps_of_freed_memory_is_not_in_use():
    watch = PhasePeaks(interval=0.002)
    watch.start("held")
    blocks = [torch.ones(2**14, dtype=torch.uint8) for _ in range(4096)]
    let_it_read(watch)
    last = blocks[-1]  # keeps the heap from giving its top back
    before = heap_free_bytes()
    del blocks
    kept = heap_free_bytes() - before
    watch.enter("freed")
    let_it_read(watch)
    watch.stop()
    assert last.numel() == 2**14
    assert kept > 40 * 2**20
    held, freed = watch.peaks["held"], watch.peaks["freed"]
    assert held.in_use - freed.in_use == pytest.approx(64 * 2**20, rel=0.2)
    assert held.resident - freed.resident < 20 * 2**20


def test_parts_add_up_to_the_peak():
    weights = Footprint(numbers=10, base=20, adapters=3, parts=1, reference=20)
    peaks = {"load": 100, "rollout": 170, "backward": 160}
    kept = {"load": 0, "rollout": 30, "backward": 5}
    parts = parts_of(peaks, kept, 50, weights, {"gradients": 4, "optimiser": 8})
    assert [sum(column) for column in zip(*parts.values(), strict=True)] == [100, 200, 165]
    assert parts["kept by the allocator"] == [0, 30, 5]
    assert parts["gradients"] == [0, 0, 4]
    assert parts["optimiser state"] == [0, 8, 8]
    assert parts["activations, caches, buffers"] == [6, 68, 54]


def test_weights_are_counted_by_part(four_bit_folder, tmp_path):
    full = make_policy()
    full.build(device=torch.device("cpu"), reference=True)
    found = footprint(full)
    numbers = sum(p.numel() for p in full.network.parameters())
    assert (found.numbers, found.base, found.reference) == (numbers, 4 * numbers, 4 * numbers)
    assert found.bf16_pair == 4 * numbers
    policy = CausalPolicy(four_bit_folder, lora=Lora(rank=4), dtype="bfloat16")
    policy.build(device=torch.device("cpu"), reference=True)
    lora = footprint(policy)
    adapters = sum(p.numel() for n, p in policy.named_parameters() if "lora_" in n)
    assert (lora.base, lora.adapters, lora.reference) == (2 * lora.numbers, 4 * adapters, 0)
    state = {
        f"policy.{name}": value for name, value in policy.trained_state(policy.state_dict()).items()
    }
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    begun = CausalPolicy(
        four_bit_folder, lora=Lora(rank=4), dtype="bfloat16", checkpoint=str(tmp_path / "last.ckpt")
    )
    begun.build(device=torch.device("cpu"), reference=True)
    assert footprint(begun).reference == 4 * adapters  # the adapters that its reference keeps
    four = footprint(
        built(four_bit_folder, lora=Lora(rank=4), dtype="bfloat16", quantization=Quantization())
    )
    assert (four.numbers, four.adapters) == (lora.numbers, lora.adapters)
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 256)
    rest = 2 * (lora.numbers - linear)
    expected = rest + linear * Quantization().bytes_per_weight()
    tables = 14 * (16 * 4 + 256 * 4 + 4)  # the codes of each layer, which are not shared
    assert four.base == pytest.approx(expected + tables, rel=0.01)


@pytest.mark.parametrize("when", ["end", "rollout"])
def test_a_moved_base_stops_the_run(four_bit_folder, tmp_path, when):
    class Moves(RolloutCallback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == (2 if when == "end" else 1):
                weight = module.policy.network.model.layers[0].mlp.up_proj.base_layer.weight
                weight.data[0] ^= 1

    policy = CausalPolicy(
        four_bit_folder, lora=Lora(rank=4), quantization=Quantization(compute_dtype="float32")
    )
    memory = MemoryAccounting(canary_every=1 if when == "rollout" else 0)
    with pytest.raises(
        UserError,
        match=r"of the quantised base moved, the first is `network.model.layers.0.mlp.up_proj",
    ):
        fit(tmp_path, callbacks=[memory, Moves()], policy=policy, max_steps=2)
    assert memory.watch._thread is None


def test_bad_options():
    with pytest.raises(
        UserError, match="`MemoryAccounting.canary_every` must be at least 0, got -1"
    ):
        MemoryAccounting(canary_every=-1)
