"""A run goes on from its own checkpoints only; another model, tokenizer, adapter or algorithm is refused in one line."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization, SupervisedWarmup
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora, Quantization, TinyPolicy, ValueHead
from lightning_mpo.resume.identity import check_identity, identity
from tests.support.runs import make_objective


def module(policy=None, **axes) -> PolicyOptimization:
    return PolicyOptimization(
        policy or TinyPolicy(hidden_size=32, layers=1, heads=2), make_objective(**axes)
    )


def refused(own: PolicyOptimization, **options) -> str:
    with pytest.raises(UserError) as error:
        check_identity("last.ckpt", identity(module()), identity(own), **options)
    return str(error.value)


def test_a_module_is_itself():
    check_identity("last.ckpt", identity(module()), identity(module()))


def test_it_loads_no_weights(monkeypatch):
    monkeypatch.setattr(TinyPolicy, "load_network", None)
    assert identity(module())["architecture"]["hidden_size"] == 32


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"hidden_size": 64}, "has the architecture hidden_size 32, the configuration 64"),
        ({"layers": 2}, "has the architecture num_hidden_layers 1, the configuration 2"),
        ({"max_length": 99}, "has the architecture digest"),
        ({"characters": "0123456789+-*=; ,"}, "has the tokenizer"),
        ({"critic": ValueHead()}, "has `policy.critic` none, the configuration ValueHead"),
    ],
)
def test_another_policy(policy, said):
    assert said in refused(
        module(TinyPolicy(**{"hidden_size": 32, "layers": 1, "heads": 2} | policy))
    )


def test_another_adapter(tiny_folder):
    saved = identity(module(CausalPolicy(tiny_folder, lora=Lora(rank=4))))
    for lora, said in (
        (Lora(rank=8), "has `policy.lora` rank 4, the configuration 8"),
        (None, "has `policy.lora` of rank 4, the configuration none"),
    ):
        with pytest.raises(UserError, match=said):
            check_identity(
                "last.ckpt", saved, identity(module(CausalPolicy(tiny_folder, lora=lora)))
            )


@pytest.mark.parametrize("change", ["weights", "dtype", "quantization"])
def test_another_base_under_the_adapters(tiny_folder, tmp_path, change):
    """It is in no checkpoint: training must not go on over another one, while other verbs may take it."""
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    moved = (
        {"model.norm.weight": weights["model.norm.weight"] + 1e-3} if change == "weights" else {}
    )
    save_file(weights | moved, other / "model.safetensors", {"format": "pt"})
    options = {
        "weights": ({}, "`policy.base`"),
        "dtype": (
            {"dtype": "bfloat16"},
            "`policy.dtype` torch.float32, and the configuration has torch.bfloat16",
        ),
        "quantization": ({"quantization": Quantization()}, "`policy.quantization` None"),
    }
    changed, said = options[change]
    saved = identity(module(CausalPolicy(tiny_folder, lora=Lora(rank=4))))
    own = identity(module(CausalPolicy(str(other), lora=Lora(rank=4), **changed)))
    with pytest.raises(UserError, match="saved with the " + said):
        check_identity("last.ckpt", saved, own)
    check_identity("last.ckpt", saved, own, algorithm=False)
    same = identity(
        module(
            CausalPolicy(str(shutil.copytree(tiny_folder, tmp_path / "same")), lora=Lora(rank=4))
        )
    )
    check_identity("last.ckpt", saved, same)
    check_identity("last.ckpt", saved, same | {"policy.base": None})  # of a hub: not known


def test_another_stage():
    warm_up = SupervisedWarmup(TinyPolicy(hidden_size=32, layers=1, heads=2))
    with pytest.raises(
        UserError, match="has the model SupervisedWarmup, the configuration PolicyOptimization"
    ):
        check_identity("last.ckpt", identity(warm_up), identity(module()))


def test_another_algorithm_is_refused_with_the_way_out_and_may_be_evaluated():
    own = module(support=TopK(4))
    said = refused(own)
    assert (
        "saved with the objective support FullVocabulary(), and the configuration has support TopK(k=4"
        in said
    )
    assert "give `policy.checkpoint` instead of `--ckpt_path`" in said
    check_identity("last.ckpt", identity(module()), identity(own), algorithm=False)


def test_other_batch_arithmetic():
    with pytest.raises(
        UserError, match=r"saved with the `rollout.prompts` 8, and the configuration has 4"
    ):
        check_identity("last.ckpt", {"rollout.prompts": 8}, {"rollout.prompts": 4})
    check_identity("last.ckpt", {"rollout.prompts": 8}, {"rollout.prompts": 4}, algorithm=False)


def test_checkpoints_that_say_less_pass():
    check_identity("last.ckpt", {}, identity(module()))


def test_another_mask_token_or_shift():
    from lightning_mpo.objective.likelihoods import Denoising
    from lightning_mpo.policies import TinyMaskedPolicy

    def masked(**options) -> PolicyOptimization:
        policy = TinyMaskedPolicy(hidden_size=32, layers=1, heads=2)
        for name, value in options.items():
            setattr(policy, name, value)
        return module(policy, likelihood=Denoising())

    saved = identity(masked())
    check_identity("last.ckpt", saved, identity(masked(mask_token="<mask>")))
    for options, said in (
        ({"mask_token": "*"}, r"has `policy.mask_token` <mask>, the configuration \*"),
        ({"shift": True}, "has `policy.shift` False, the configuration True"),
    ):
        with pytest.raises(UserError, match=said):
            check_identity("last.ckpt", saved, identity(masked(**options)))
    assert not any("mask" in name or "shift" in name for name in identity(module()))
