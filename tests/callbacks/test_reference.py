"""The reference moves when it should, to where it should."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.callbacks import KLTracking, ReferenceUpdate
from lightning_mpo.export.verify import observe
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.policies import CausalPolicy, Lora, Quantization
from tests.support.builders import make_prompts
from tests.support.many_ranks import double
from tests.support.references import LORA, _saving, reference_of, run
from tests.support.runs import make_objective, make_policy, same


class Keep(RolloutCallback):
    """Keeps what was there when each rollout began, before the reference moved, and how far apart it was scored."""

    def __init__(self) -> None:
        self.policies, self.apart, self.stored = [], [], []

    def on_rollout_start(self, trainer, module, sequences, limit):
        self.policies.append(
            {n: w.detach().clone() for n, w in module.policy.network.named_parameters()}
        )

    def on_rollout_end(self, trainer, module, event):
        rollout = event.experience.rollout
        now_BT, reference_BT = (
            module.score(rollout, reference=flag).logprobs_BT for flag in (False, True)
        )
        self.apart.append((now_BT - reference_BT).abs().max().item())
        self.stored.append(torch.equal(event.experience.reference_logprobs_BT, reference_BT))


def kind(name: str, request) -> CausalPolicy:
    """Return an unbuilt policy: all of whose weights are trained, with adapters, or with adapters on 4 bits."""
    if name == "copy":
        return make_policy()
    if name == "lora":
        return CausalPolicy(request.getfixturevalue("tiny_folder"), lora=LORA)
    source = request.getfixturevalue("four_bit_folder")
    return CausalPolicy(source, lora=LORA, quantization=Quantization(compute_dtype="float32"))


@pytest.mark.parametrize("name", ["copy", "lora", "four"])
def test_a_refreshed_reference_is_the_policy_that_samples_the_rollout(tmp_path, request, name):
    """At rollouts 2 and 4 of five, and the base under adapters stays as it is to the bit."""
    keep = Keep()
    done = run(tmp_path, kind(name, request), ReferenceUpdate(every=2), callbacks=[keep])
    assert [apart < 1e-6 for apart in keep.apart] == [True, False, True, False, True], keep.apart
    assert min(keep.apart[1], keep.apart[3]) > 1e-3
    assert all(keep.stored), "the log-probs of the rollout are of another reference"
    bases = [
        {n: w for n, w in part.items() if "lora_" not in n}
        for part in (keep.policies[0], dict(done.module.policy.network.named_parameters()))
    ]
    if name != "copy":
        assert same(*bases)
        assert done.module.policy.reference_network is None
    else:
        assert not same(*bases)


def test_of_a_frozen_copy_all_weights_are_averaged(tmp_path):
    keep = Keep()
    done = run(tmp_path, make_policy(), ReferenceUpdate(every=2, mixup=0.3), callbacks=[keep])
    expected = {n: w.double() for n, w in keep.policies[0].items()}
    for counter in (2, 4):
        expected = {
            n: 0.3 * keep.policies[counter][n].double() + 0.7 * w for n, w in expected.items()
        }
    found = dict(done.module.policy.reference_network.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-7)
    assert not any(weight.requires_grad for weight in found.values())
    assert not same(found, dict(done.module.policy.network.named_parameters()))


@pytest.mark.parametrize("begun", [False, True], ids=["base", "checkpoint"])
def test_of_adapters_a_and_b_are_averaged_apart(tmp_path, tiny_folder, begun):
    """From those of the checkpoint where the run began with some; else from B = 0 and the A of when it first moves."""
    checkpoint = None
    if begun:
        run(
            tmp_path,
            CausalPolicy(tiny_folder, lora=LORA),
            None,
            updates=2,
            callbacks=[_saving(tmp_path)],
        )
        checkpoint = str(tmp_path / "last.ckpt")
    keep = Keep()
    policy = CausalPolicy(tiny_folder, lora=LORA, checkpoint=checkpoint)
    done = run(
        tmp_path / "after", policy, ReferenceUpdate(every=1, mixup=0.3), callbacks=[keep], updates=4
    )
    expected = {n: w.double() for n, w in keep.policies[0].items() if "lora_" in n}
    if not begun:
        expected = {n: w * ("lora_A" in n) for n, w in keep.policies[1].items() if n in expected}
    assert begun == any(bool(w.any()) for n, w in expected.items() if "lora_B" in n)
    for counter in (1, 2, 3):
        expected = {
            n: 0.3 * keep.policies[counter][n].double() + 0.7 * w for n, w in expected.items()
        }
    found = reference_of(done)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-7)


def test_mixing_factors_differs_from_mixing_products_as_it_is_said(tiny_folder):
    policy = double(CausalPolicy(tiny_folder, lora=Lora(rank=2, alpha=6)))
    policy.build(device=torch.device("cpu"), reference=True)
    layers = [part for part in policy.network.modules() if hasattr(part, "lora_A")]

    def draw():
        for layer in layers:
            torch.nn.init.normal_(layer.lora_A["default"].weight)
            torch.nn.init.normal_(layer.lora_B["default"].weight)

    def added(reference):
        """Return A and B of each layer, and what they add to the base."""
        with policy.as_reference(reference), torch.no_grad():
            parts = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
            return [
                (a.clone(), b.clone(), x.get_delta_weight("default"))
                for x, (a, b) in zip(layers, parts, strict=True)
            ]

    draw()
    policy.reference.mix(1.0)
    draw()
    m, now, before = 0.3, added(False), added(True)
    policy.reference.mix(m)
    assert len(layers) == 14
    for (a, b, policys), (a_, b_, references), (_, _, mixed) in zip(
        now, before, added(True), strict=True
    ):
        off = mixed - (m * policys + (1 - m) * references)
        torch.testing.assert_close(off, -m * (1 - m) * (b - b_) @ (a - a_) * 6 / 2)  # alpha / rank


def test_nobody_but_the_penalty_notices(tmp_path, tiny_folder):
    """Where the reference is only watched, weights and samples are those of a run whose reference stays."""
    runs = [
        run(
            tmp_path / str(i),
            CausalPolicy(tiny_folder, lora=LORA),
            update,
            callbacks=[KLTracking()],
            objective=make_objective(),
        )
        for i, update in enumerate((None, ReferenceUpdate(every=2, mixup=0.5)))
    ]
    assert same(runs[0].weights, runs[1].weights)
    still, moving = (run.record.column("kl/rollout_mean") for run in runs)
    assert still[:2] == moving[:2]
    assert all(near < far for near, far in zip(moving[2:], still[2:], strict=True))


def test_an_export_is_still_compared_with_the_base(tmp_path, tiny_folder):
    policy = CausalPolicy(tiny_folder, lora=LORA)
    run(tmp_path, policy, ReferenceUpdate(every=1), updates=3)
    policy.reference.mix(1.0)
    moved = observe(policy, make_prompts([5, 3]), 1.0)
    base = CausalPolicy(tiny_folder, lora=LORA)
    base.build(device=torch.device("cpu"), reference=True)
    mask_BT = moved.sampled.response_mask_BT
    with torch.no_grad():
        expected = base.score(moved.sampled, mask_BT, temperature=1.0, reference=True).logprobs_BT[
            mask_BT
        ]
    torch.testing.assert_close(moved.base_logprobs_n, expected, rtol=0, atol=1e-5)
    assert (moved.base_logprobs_n - moved.logprobs_n).abs().max() > 1e-3
