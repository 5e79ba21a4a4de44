"""Run by `test_resume.py`: one run that nothing disturbs, and N that are killed somewhere and go on.

python killed_runs.py FOLDER N SEED      prints a line per kill; exits 1 if a run ends in another way

Every run is a fork of this process, which has imported everything and started no thread.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import peft  # noqa: F401  imported once, not by each run
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

from lightning_mpo.callbacks import (
    ExactResume,
    KillAt,
    KLTracking,
    PromptOrder,
    ReferenceUpdate,
    Samples,
    SupportOverlap,
    Watchdog,
)
from lightning_mpo.callbacks.kill import PHASES
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.resume.comparison import compare_runs
from lightning_mpo.resume.metrics_csv import MetricsCSV
from tests.support.runs import adam, fit, make_data, make_objective

UPDATES = 8
EVENTS = {
    "rollout": 32,
    "micro-batch": 8,
    "update": 8,
    "validation": 4,
    "write": 6700,
    "rename": 8,
    "saved": 8,
}
"""Events of each kind in an undisturbed run, at least."""


def train(folder: Path, source: str, *, resume: bool = False, kill: KillAt | None = None) -> None:
    """Train for 8 updates: two of a rollout, three rollouts an epoch, dropout, validation every third update."""
    last = folder / "checkpoints" / "last.ckpt"
    resume = resume and last.exists()
    random.seed(4 if resume else 3)  # Python draws a new one after a fork
    torch.manual_seed(4 if resume else 3)  # other random numbers than those that are restored
    fit(
        folder,
        policy=CausalPolicy(source, lora=Lora(rank=2, alpha=4, dropout=0.1)),
        objective=make_objective(
            support=TopK(6),
            terms=[KLPenalty(AdaptiveCoefficient(target=0.01, coefficient=0.1, horizon=16))],
        ),
        rollout={"minibatches": 2},
        module={
            "optimizer": adam(3e-3),
            "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(
                optimizer, 1.0, 0.1, UPDATES
            ),
        },
        callbacks=[
            KLTracking(),
            ReferenceUpdate(every=1, mixup=0.5),
            Watchdog(),
            Samples(every=1, show=False),
            SupportOverlap(every=2, rows=4),
            PromptOrder(),
            ExactResume(),
            *([kill] if kill else []),
            ModelCheckpoint(
                folder / "checkpoints",
                save_last=True,
                every_n_train_steps=2,
                enable_version_counter=False,
            ),
        ],
        logger=MetricsCSV(folder, name="", version=""),
        accumulate_grad_batches=2,
        max_steps=UPDATES,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        data=make_data(validation_batch_size=2),
        gradient_clip_val=1.0,
        ckpt_path=str(last) if resume else None,
    )


def log_of(folder: object) -> Path:
    return Path(f"{folder}.log")


def forked(*arguments: object, **options: object) -> int:
    """Train in a child; return its exit status, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(log_of(arguments[0]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(*arguments, **options)  # type: ignore[arg-type]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def differences(whole: Path, run: Path) -> list[str]:
    return [part.difference for part in compare_runs(whole, run) if part.difference is not None]


def main() -> int:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source = str(folder / "model")
    torch.set_num_threads(1)
    assert forked(folder / "whole", source) == 0
    draw, bad = random.Random(seed), 0
    for i in range(count):
        phase = PHASES[i % len(PHASES)]
        killer = KillAt(phase, draw.randint(1, EVENTS[phase]))
        run = folder / str(i)
        status = forked(run, source, kill=killer)
        last = run / "checkpoints" / "last.ckpt"
        at = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        after = forked(run, source, resume=True)
        found = differences(folder / "whole", run) if after == 0 else ["the continued run failed"]
        if status != -9:
            found.append(f"the run was not killed, but ended with {status}")
        bad += bool(found)
        print(
            f"kill {i:2d}  {phase:11s} {killer.count:3d}  resumed at {at:2d}  {found[0] if found else 'bit for bit'}",
            flush=True,
        )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
