"""Checkpoints as input: nothing in them is run, damage is found, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, Lora, TinyPolicy
from lightning_mpo.policies.checkpoints import read_policy
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.storage import read_checkpoint
from tests.support.malicious import MARK, write_malicious


def adapted(folder: str, **options) -> CausalPolicy:
    return CausalPolicy(folder, **({"lora": Lora(rank=4, alpha=8)} | options))


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory) -> Path:
    """A folder of adapters that peft wrote, of a policy that moved away from its base."""
    policy = adapted(tiny_folder)
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapters")
    policy.adapters.save_pretrained(folder, save_embedding_layers=False)
    torch.save({"state_dict": {f"policy.{k}": v for k, v in policy.trained_state(policy.state_dict()).items()}},
               folder / "last.ckpt")  # fmt: skip
    return folder


# --- what files may do --------------------------------------------------------------------------------------------------


def test_the_file_would_run_code_if_it_were_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(write_malicious(tmp_path / "bad.ckpt"), weights_only=False)
    assert Path(MARK).exists()


@pytest.mark.parametrize("forced", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch, forced):
    monkeypatch.chdir(tmp_path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = write_malicious(tmp_path / "bad.ckpt")
    with pytest.raises(
        UserError,
        match=r"`policy.checkpoint` .*bad.ckpt'.* asks to run \w+.system, and code in files is",
    ):
        read_policy(str(path))
    with pytest.raises(UserError, match="code in files is never run"):
        TinyPolicy(checkpoint=str(path)).check()
    assert not Path(MARK).exists()


def test_an_adapter_folder_with_pickled_weights_is_not_read(
    adapters, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters, "pickled")
    Path("pickled/adapter_model.safetensors").unlink()
    write_malicious(Path("pickled/adapter_model.bin"))
    with pytest.raises(UserError, match=r"a folder without adapter_model.safetensors"):
        adapted(tiny_folder, checkpoint="pickled").check()
    assert not Path(MARK).exists()


def test_a_changed_byte_is_found(adapters, tmp_path):
    """Torch itself does not look at checksums."""
    content = bytearray((adapters / "last.ckpt").read_bytes())
    weight = torch.load(adapters / "last.ckpt", weights_only=True)["state_dict"]
    place = content.find(next(iter(weight.values())).numpy().tobytes()[:32])
    content[place + 5] ^= 64
    (tmp_path / "bad.ckpt").write_bytes(content)
    torch.load(tmp_path / "bad.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"is damaged: the checksum of '\S+' in it is wrong"):
        read_checkpoint(tmp_path / "bad.ckpt", "`--checkpoint`")


def test_a_checkpoint_of_a_stage_that_was_stopped_is_told(adapters, recwarn):
    path, line = adapters / "last.ckpt", "is of a stage that was stopped before its end"
    mark = adapters / ".last.ckpt.unfinished"
    read_policy(str(path))
    assert not [warning for warning in recwarn if line in str(warning.message)]
    mark.touch()
    try:
        with pytest.warns(UserWarning, match=line):
            read_policy(str(path))
    finally:
        mark.unlink()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(adapters, tmp_path, share):
    content = (adapters / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        UserError, match=r"`--checkpoint` '.*cut.ckpt' cannot be read as a Lightning checkpoint"
    ):
        read_checkpoint(tmp_path / "cut.ckpt", "`--checkpoint`")


@pytest.mark.parametrize(
    ("name", "said"),
    [("adapter_model.safetensors", " as safetensors"), ("adapter_config.json", ": ")],
)
def test_a_truncated_adapter_folder_is_named(adapters, tiny_folder, tmp_path, name, said):
    folder = tmp_path / "cut"
    shutil.copytree(adapters, folder)
    (folder / name).write_bytes((adapters / name).read_bytes()[:-20])
    with pytest.raises(
        UserError, match=rf"`policy.checkpoint` '.*cut': {name} cannot be read{said}"
    ):
        adapted(tiny_folder, checkpoint=str(folder)).check()


# --- what fits ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_adapters_only(adapters, tiny_folder):
    state = read_checkpoint(adapters / "last.ckpt", "it")["state_dict"]
    assert state
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    whole = (Path(tiny_folder) / "model.safetensors").stat().st_size
    assert sum(value.nbytes for value in state.values()) < 0.5 * whole


def test_a_folder_of_adapters_is_the_checkpoint_of_them(adapters, tiny_folder):
    states = []
    for checkpoint in (adapters / "last.ckpt", adapters):
        policy = adapted(tiny_folder, checkpoint=str(checkpoint))
        policy.check()
        policy.build(device=torch.device("cpu"), reference=False)
        states.append(policy.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(value.any() for name, value in states[1].items() if "lora_B" in name)


@pytest.mark.parametrize("form", ["last.ckpt", ""])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": None}, "holds adapters of rank 4 and the policy has none: give `policy.lora`"),
        ({"lora": Lora(rank=8)}, "holds adapters of rank 4, `policy.lora` has 8"),
    ],
)
def test_other_adapters_are_refused_before_a_model_is_loaded(
    adapters, tiny_folder, monkeypatch, form, options, said
):
    policy = adapted(tiny_folder, checkpoint=str(adapters / form), **options)
    monkeypatch.setattr(policy, "load_network", lambda: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        policy.check(ScoreRequest())


def test_another_scale_is_refused_where_the_file_says_it(adapters, tiny_folder):
    with pytest.raises(UserError, match="holds adapters of alpha 8, `policy.lora` has 32"):
        adapted(tiny_folder, lora=Lora(rank=4), checkpoint=str(adapters)).check()


@pytest.mark.parametrize(
    "entry",
    [
        {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"},
        {"trainable_token_indices": [1]}, {"lora_bias": True}, {"layer_replication": [[0, 1]]},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_that_are_not_plain_are_refused(adapters, tiny_folder, tmp_path, entry):
    folder = shutil.copytree(adapters, tmp_path / "elsewhere")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | entry))
    with pytest.raises(
        UserError, match=f"`{next(iter(entry))}: .* merge them into their base"
    ) as error:
        adapted(tiny_folder, checkpoint=str(folder)).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"use_rslora": False},
        {"rank_pattern": {}},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": None},
    ],
)
def test_plain_adapters_from_elsewhere_are_taken(adapters, tiny_folder, tmp_path, entry):
    folder = shutil.copytree(adapters, tmp_path / "elsewhere")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | entry))
    adapted(tiny_folder, checkpoint=str(folder)).check()


def test_whole_weights_are_refused_by_a_policy_with_adapters(tiny_policy, tiny_folder, tmp_path):
    state = {f"policy.{name}": value for name, value in tiny_policy().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "whole.ckpt")
    with pytest.raises(
        UserError, match="holds whole weights and no adapters: leave out `policy.lora`"
    ):
        adapted(tiny_folder, checkpoint=str(tmp_path / "whole.ckpt")).check()


def test_a_whole_model_is_no_checkpoint(tiny_folder):
    with pytest.raises(UserError, match="it is a whole model: name it as `policy.source`"):
        adapted(tiny_folder, checkpoint=tiny_folder).check()


def test_adapters_of_another_architecture(adapters, tiny_policy, tmp_path):
    other = tiny_policy(hidden_size=64)
    other.network.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=r"does not fit the policy: .* has shape \[4, 128\], the policy needs \[4, 256\]",
    ):
        adapted(str(tmp_path), checkpoint=str(adapters)).build(
            device=torch.device("cpu"), reference=False
        )


def test_a_weight_that_is_missing_is_named(adapters, tiny_folder, tiny_policy, tmp_path):
    """`export` and `predict` load checkpoints so."""
    content = torch.load(adapters / "last.ckpt", weights_only=True)
    gone = next(name for name in content["state_dict"] if "q_proj" in name)
    del content["state_dict"][gone]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="1 weights are missing") as error:
        adapted(tiny_folder, checkpoint=str(tmp_path / "last.ckpt")).build(
            device=torch.device("cpu"), reference=False
        )
    assert gone.removeprefix("policy.") in str(error.value)
    state = tiny_policy().state_dict()
    gone = next(name for name in state if "q_proj" in name)
    whole = {f"policy.{name}": value for name, value in state.items() if name != gone}
    torch.save({"state_dict": whole}, tmp_path / "whole.ckpt")
    policy = CausalPolicy(tiny_folder, checkpoint=str(tmp_path / "whole.ckpt"))
    with pytest.raises(UserError, match="1 weights are missing") as error:
        policy.build(device=torch.device("cpu"), reference=False)
    assert gone in str(error.value)
