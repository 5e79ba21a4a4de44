"""The support head under `torch.compile` is the support head."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.low_rank import LowRank
from tests.support.head_options import support_logits, support_logprobs
from tests.support.heads import low_rank, problem


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, form, *, masked: bool, adapted: bool, scores: bool) -> list[Tensor]:
    """Return outputs and gradients of everything that can be trained; masked positions hold rubbish."""
    hidden, weight, bias, tokens, support, mask = problem(dtype=torch.float32, seed=21)
    slots = torch.ones_like(support, dtype=torch.bool)
    slots[:, :, 0] = support[:, :, 0] == tokens
    if masked:
        assert not mask.all()
        hidden = torch.where(mask[..., None], hidden, torch.nan)
        support, tokens = (
            torch.where(mask[..., None], support, 10**6),
            torch.where(mask, tokens, -100),
        )
    leaves = [hidden, weight, bias, *(low_rank(dtype=torch.float32) if adapted else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    options = {"bias_V": leaves[2], "chunk_size": 3, "mask_BT": mask if masked else None, **form}
    if adapted:
        options["adapter"] = LowRank(leaves[3], leaves[4], 1.5)
    if scores:
        options |= {"support_mask_BTK": slots, "entropy_grad": True, "return_logits": True}
        outputs = function(hidden, weight, tokens, support, **options)
    else:
        outputs = [function(hidden, weight, support, **options)]
    return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)]


def compare(backend: str, form, scores: bool, **options) -> None:
    function = support_logprobs if scores else support_logits
    plain = run(function, form, scores=scores, **options)
    compiled = run(
        torch.compile(function, fullgraph=True, backend=backend), form, scores=scores, **options
    )
    for one, other in zip(compiled, plain, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "form", [{}, {"softcap": 2.0, "scale": 1.7, "temperature": 0.6}], ids=["plain", "capped"]
)
@pytest.mark.parametrize(("masked", "adapted"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("scores", [False, True], ids=["logits", "logprobs"])
def test_compiled_is_eager(form, masked, adapted, scores):
    compare("aot_eager", form, scores, masked=masked, adapted=adapted)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
@pytest.mark.parametrize("scores", [False, True], ids=["logits", "logprobs"])
def test_compiled_by_inductor_is_eager(scores):
    compare("inductor", {"softcap": 2.0, "temperature": 0.6}, scores, masked=True, adapted=True)
