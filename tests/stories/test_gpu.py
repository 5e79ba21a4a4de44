"""What is owed on a CUDA device: `pytest -m gpu`. Put what it prints into RESULTS.md, with the device's name."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_mpo.data import Arithmetic
from lightning_mpo.functional import heads
from lightning_mpo.functional.head_logits import Head
from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.sampling import LocalSampler, SamplingRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def policy() -> TinyPolicy:
    torch.manual_seed(0)
    policy = TinyPolicy("0123456789+=,;", hidden_size=128, layers=2)
    policy.build(device=torch.device("cuda"), reference=False)
    return policy


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4)])
def test_sampler_and_trainer_agree_on_the_device(policy: TinyPolicy, support: Support) -> None:
    data = Arithmetic(train_problems=100, held_out_problems=10)
    data.connect(policy.tokenizer)
    rollout = LocalSampler().sample(
        policy, data.prompts(0, 16), 4, SamplingRequest(support, 0.8, 32),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    parity = check_parity(policy, rollout, temperature=0.8, exact=True)
    print(torch.cuda.get_device_name(), type(support).__name__, parity)
    assert parity.max < 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_head_memory_does_not_hold_all_logits(trained: bool) -> None:
    tokens, vocabulary, size = 4096, 152_000, 896
    hidden_TD = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(
        vocabulary, size, device="cuda", dtype=torch.bfloat16, requires_grad=trained
    )
    target_T = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    heads.full_logprobs(hidden_TD, Head(weight_VD), target_T)[0].sum().backward()
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
    logits = tokens * vocabulary * 4
    print(
        f"{torch.cuda.get_device_name()}: trained={trained} {seconds:.3f} s, {peak / 2**20:.0f} MiB"
    )
    assert peak < logits / 2 + (3 * 4 * weight_VD.numel() if trained else 0)
