"""Run by `test_ddp.py`: the same training on one process and on two, and a resume within a rollout on two.

python two_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.advantages import GeneralizedAdvantage
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ValueHead
from lightning_mpo.rollout import DynamicSampling
from tests.support.runs import ByPrompt, Digits, Probe, fit, make_objective, make_policy, sgd

CASES = {
    "tokens": {"reduction": TokenMean()},
    "sequences": {"reduction": SequenceMean()},
    "constant": {"reduction": ConstantLength(16)},
    "ppo": {"advantage": GeneralizedAdvantage(whiten=True), "terms": [ValueLoss(0.5, 0.2)]},
}
"""Axes of the objectives."""


class FewLow(Digits):
    """Right where more than three quarters of the characters are digits below 5: groups of all kinds."""

    is_accuracy = True

    def score(self, completions):
        return [float(share > 0.75) for share in super().score(completions)]


class Accounts(RolloutCallback):
    """Keeps what the rounds of each rollout came to on this rank."""

    def __init__(self) -> None:
        self.sums: list[dict[str, float]] = []

    def on_rollout_end(self, trainer, module, event):
        self.sums.append({name: value for name, (value, _) in event.counts.sums().items()})


def train(folder: Path, case: str, devices: int):
    """Train for six updates, three rollouts of two passes each."""
    rates = {"critic": 0.1} if case == "ppo" else {}
    return fit(
        folder,
        rollout={"sampler": ByPrompt(), "epochs": 2, "max_new_tokens": 16},
        policy=make_policy(critic=ValueHead()),  # frozen where no case asks for values
        objective=make_objective(**CASES[case]),
        module={"optimizer": sgd(0.05), "learning_rates": rates},
        accumulate_grad_batches=2,
        max_steps=6,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )


def resume(folder: Path) -> dict[str, object]:
    """Stop in the middle of a rollout and go on; each rank says what it ended with."""
    shared = {
        "devices": 2,
        "strategy": "ddp",
        "accumulate_grad_batches": 2,
        "rollout": {"minibatches": 2, "epochs": 2},
    }
    rows: list[int] = []

    def look(trainer, module, batch, batch_idx):
        rows.append(int(batch["micro_batch"].rollout.tokens_BL.sum()))

    whole = fit(
        folder / "whole",
        **shared,
        max_steps=8,
        callbacks=[Probe(on_train_batch_start=look)],
        first=True,
    )
    expected, rows[:] = rows[:], []
    fit(folder, **shared, max_steps=5, callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)])
    resumed = fit(
        folder, **shared, max_steps=8, callbacks=[Probe(on_train_batch_start=look)], first=True,
        ckpt_path=str(folder / "last.ckpt"),
    )  # fmt: skip
    off = max(
        (resumed.weights[name] - whole.weights[name]).abs().max().item() for name in whole.weights
    )
    return {"off": off, "rows": rows, "expected": expected[10:]}


def dynamic(folder: Path) -> dict[str, object]:
    """Fill rollouts on both ranks, and go on within one."""
    shared = {
        "rollout": {"rewards": [FewLow()], "minibatches": 2, "dynamic": DynamicSampling(3)},
        "devices": 2,
        "strategy": "ddp",
    }
    accounts = Accounts()
    whole = fit(folder / "whole", **shared, max_steps=8, callbacks=[accounts])
    fit(folder, **shared, max_steps=3, callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)])
    resumed = fit(folder, **shared, max_steps=8, ckpt_path=str(folder / "last.ckpt"))
    off = max(
        (resumed.weights[name] - whole.weights[name]).abs().max().item() for name in whole.weights
    )
    total = sum(weight.double().sum().item() for weight in whole.weights.values())
    return {
        "accounts": accounts.sums,
        "logged": whole.record.without_clocks(),
        "off": off,
        "weights": total,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    said: dict[str, object] = {}
    for name in CASES:
        run = train(folder, name, 2)
        said[name] = run.record.without_clocks()
        torch.save(run.weights, folder / f"{name}-{rank}.pt")
    said["resume"] = resume(folder)
    said["dynamic"] = dynamic(folder / "dynamic")
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
