"""CPU time of judging answers by `MathAnswer`, as a share of a training step on as many completions.

    python benchmarks/judging.py [--completions 256] [--rows 4] [--tokens 128]

The step is sampling, one forward and one backward pass of a network with the sizes of SmolLM2-135M
and random weights, on one thread. It is measured on a few rows, and scaled to all completions. CPU
time is compared, not the clock, so other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import random
import time

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mpo.rewards import Completion, MathAnswer
from lightning_mpo.rewards import math as math_rewards

PROMPT_TOKENS = 64


def judging_seconds(count: int) -> float:
    """Return the CPU seconds of judging distinct worked solutions, in all processes."""
    draws = random.Random(0)
    numbers = [draws.randrange(2, 5000) for _ in range(count)]
    rows = [
        Completion(
            "p",
            f"There are {n} boxes of 12 apples and {n // 2} are sold, so {n}*12 - {n // 2}*12 = "
            f"<<{n}*12-{n // 2}*12={(n - n // 2) * 12}>>{(n - n // 2) * 12}.\n#### {n * 12 + i % 2}",
            str(n * 12),
            60,
            True,
            {},
        )
        for i, n in enumerate(numbers)
    ]
    reward = MathAnswer()
    reward.score([Completion("p", f"#### {-i}", "0", 1, True, {}) for i in range(8)])  # start

    def used() -> float:
        pids = [helper._process.pid for helper in math_rewards._pool.idle if helper._process]
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return time.process_time() + sum(t.user + t.system for t in times)

    before = used()
    reward.score(rows)
    reward.answered(rows)
    return used() - before


def step_seconds(rows: int, tokens: int) -> float:
    """Return the CPU seconds of sampling, a forward and a backward pass."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    network = LlamaForCausalLM(config)
    prompts = torch.randint(0, config.vocab_size, (rows, PROMPT_TOKENS))
    started = time.process_time()
    ids = network.generate(
        prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, pad_token_id=0
    )
    network(ids, labels=ids).loss.backward()
    return time.process_time() - started


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--completions", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    judging = judging_seconds(options.completions)
    step = step_seconds(options.rows, options.tokens) * options.completions / options.rows
    print(f"judging    {judging:8.2f} s CPU for {options.completions} answers")
    print(f"step       {step:8.2f} s CPU for as many completions of {options.tokens} tokens")
    print(f"ratio      {judging / step:8.2%}")


if __name__ == "__main__":
    main()
