"""One thread unless `OMP_NUM_THREADS` says otherwise, one seed, and small policies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # `python -m pytest` puts it there, plain `pytest` does not
    sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # no test needs the hub; without a network a look-up takes half a minute
)
pytest.register_assert_rewrite("tests.support")  # its checks explain themselves as tests do
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test puts on the import path; the command line puts its working folder there."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def tiny_policy() -> Callable:
    """Return a factory of built `TinyPolicy`s: same seed, same weights.

    `sharp` scales the weights, so that log-probs, positions and temperature matter; `reference` keeps a frozen copy;
    `double` computes in float64; `prepare` is called with the policy before it is built.
    """
    from lightning_mpo.policies import TinyPolicy
    from tests.support.builders import CHARACTERS

    def make(
        *,
        seed: int = 0,
        sharp: float = 6.0,
        reference: bool = False,
        double: bool = False,
        prepare: Callable | None = None,
        **options,
    ) -> TinyPolicy:
        arguments = {"characters": CHARACTERS, "hidden_size": 32, "layers": 2, "heads": 2} | options
        policy = TinyPolicy(**arguments)
        load = policy.load_network

        def load_sharp():
            torch.manual_seed(seed)
            network = load()
            with torch.no_grad():
                for weight in network.parameters():
                    if weight.ndim == 2:
                        weight.mul_(sharp)
            return network.double() if double else network

        policy.load_network = load_sharp
        if prepare is not None:
            prepare(policy)
        policy.build(device=torch.device("cpu"), reference=reference)
        return policy

    return make


@pytest.fixture(scope="session")
def tiny_masked() -> Callable:
    """Return a factory of built `TinyMaskedPolicy`s, as `tiny_policy` does."""
    from tests.support.masked import make_masked

    return make_masked


@pytest.fixture(scope="session")
def tiny_folder(tiny_policy, tmp_path_factory) -> str:
    """Return a folder in Hugging Face's format with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    policy = tiny_policy()
    policy.network.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def four_bit_folder(tiny_policy, tmp_path_factory) -> str:
    """Return a folder with a model of 64 dimensions, since blocks of 4-bit scales are 64 long."""
    folder = tmp_path_factory.mktemp("four")
    policy = tiny_policy(hidden_size=64, sharp=4.0)
    policy.network.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)
