"""Run by `test_sharding.py` on two processes: what a policy in shards loads, samples, scores, saves and refuses.

python two_shards_of_a_policy.py FOLDER MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mpo.callbacks import KLTracking, Predictions, Report, SupportOverlap, Watchdog
from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora, ParallelHeads
from lightning_mpo.rollout import DynamicSampling
from tests.support.many_ranks import strategy_of, whole
from tests.support.runs import Probe, Run, fit, make_data, make_objective, make_policy, sgd
from tests.support.two_ranks import Accounts, FewLow


def step_wise(policy: Any, gather: bool) -> Any:
    policy.gather_rollouts = gather
    return policy


def load(folder: Path, model: str) -> dict[str, Any]:
    """Load a pretrained model with its reference, and train two updates with activations recomputed."""
    policy = CausalPolicy(model, gradient_checkpointing=True)
    calls, read = [], policy.load_network
    policy.load_network = lambda: (calls.append(1), read())[1]
    seen: dict[str, Any] = {}

    def look(trainer, module):
        weights = dict(module.policy.named_parameters())
        seen["own"] = sum(w.to_local().numel() for w in weights.values())
        seen["all"] = sum(w.numel() for w in weights.values())
        seen["names"] = [name for name in module.policy.state_dict() if "reference" in name]
        seen["tied"] = (
            module.policy.network.lm_head.weight is module.policy.network.model.embed_tokens.weight
        )
        loaded = {name: whole(weight) for name, weight in weights.items()}
        if trainer.is_global_zero:
            torch.save(loaded, folder / "loaded.pt")

    run = fit(
        folder, policy=policy, callbacks=[KLTracking(), Probe(on_train_start=look)], max_steps=2, rollout={"epochs": 2},
        module={"optimizer": sgd()}, **strategy_of("fsdp", 2),
    )  # fmt: skip
    weights = {name: whole(weight) for name, weight in run.weights.items()}
    if run.trainer.is_global_zero:
        torch.save(weights, folder / "trained.pt")
    return {**seen, "calls": len(calls), "logged": run.record.without_clocks()}


def take_checkpoint(folder: Path, kind: str) -> dict[str, Any]:
    """Save a run, start another policy from its checkpoint, and compare what it starts with."""
    first = fit(
        folder, policy=make_policy(mtp=ParallelHeads(1)), module={"optimizer": sgd()}, max_steps=2,
        callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)], **strategy_of(kind, 2),
    )  # fmt: skip
    started: list[dict[str, Tensor]] = []

    def look(trainer, module):
        started.append({name: whole(weight) for name, weight in module.policy.named_parameters()})

    second = fit(
        folder, policy=make_policy(mtp=ParallelHeads(1), checkpoint=str(folder / "last.ckpt")), max_steps=1,
        callbacks=[Probe(on_train_start=look)], **strategy_of("fsdp", 2),
    )  # fmt: skip
    off = [float((started[0][name] - whole(w)).abs().max()) for name, w in first.weights.items()]
    return {"off": max(off), "cold": sorted(second.module.policy.cold_parts)}


def resume(folder: Path, kind: str) -> dict[str, Any]:
    """Stop in the middle of a rollout and go on."""

    def run(where: Path, **options: Any) -> Run:
        shared = {"accumulate_grad_batches": 2, "rollout": {"minibatches": 2, "epochs": 2}}
        return fit(where, **shared, **options, **strategy_of(kind, 2))

    rows: list[int] = []

    def look(trainer, module, batch, batch_idx):
        rows.append(int(batch["micro_batch"].rollout.tokens_BL.sum()))

    probe, track = Probe(on_train_batch_start=look), KLTracking()
    fitted = run(folder / "whole", max_steps=8, callbacks=[probe, track], first=True)
    expected, rows[:] = rows[:], []
    save = ModelCheckpoint(dirpath=folder, save_last=True)
    run(folder, max_steps=5, callbacks=[save, track])
    more = {"callbacks": [probe, track], "first": True, "ckpt_path": str(folder / "last.ckpt")}
    resumed = run(folder, max_steps=8, **more)
    off = max(
        (whole(resumed.weights[n]) - whole(fitted.weights[n])).abs().max().item()
        for n in fitted.weights
    )
    return {
        "off": off,
        "rows": rows,
        "expected": expected[10:],
        "logged": resumed.record.without_clocks(),
        "whole": fitted.record.without_clocks(),
        "folder": (folder / "last.ckpt").is_dir(),
    }


def dynamic(folder: Path, gather: bool) -> dict[str, Any]:
    """Fill rollouts in rounds in which one process draws and the other does not."""
    rollout = {"rewards": [FewLow()], "minibatches": 2, "dynamic": DynamicSampling(3), "prompts": 4}
    accounts, policy = Accounts(), step_wise(make_policy(), gather)
    run = fit(
        folder,
        policy=policy,
        rollout=rollout,
        callbacks=[accounts],
        max_steps=8,
        **strategy_of("fsdp", 2),
    )
    total = sum(whole(weight).double().sum().item() for weight in run.weights.values())
    return {"accounts": accounts.sums, "weights": total}


def everything(folder: Path, gather: bool) -> dict[str, Any]:
    """Everything that scores or samples outside the update, on ranks whose rollouts differ in length."""
    callbacks = [
        KLTracking(),
        SupportOverlap(every=1),
        Watchdog(),
        Report(problems=4, completions=2),
        Predictions(),
    ]
    run = fit(
        folder,
        policy=step_wise(make_policy(), gather),
        objective=make_objective(support=TopK(6)),
        module={"score_tokens": 60},
        rollout={"max_new_tokens": 24, "epochs": 2},
        callbacks=callbacks,
        max_steps=6,
        limit_val_batches=1.0,
        num_sanity_val_steps=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        **strategy_of("fsdp", 2),
    )
    summary = (
        json.loads((folder / "summary.json").read_text()) if run.trainer.is_global_zero else {}
    )
    summary = {stage: summary[stage] for stage in ("initial", "final") if stage in summary}
    data = make_data(
        digits=2, held_out_problems=5, validation_batch_size=1
    )  # three batches here, two there
    run.trainer.predict(run.module, datamodule=data)
    lines = (
        (folder / "completions" / f"predictions-{run.trainer.global_rank}.jsonl")
        .read_text()
        .splitlines()
    )
    weights = {name: whole(weight) for name, weight in run.weights.items()}
    total = sum(weight.double().sum().item() for weight in weights.values())
    return {
        "logged": run.record.without_clocks(),
        "summary": summary,
        "predicted": len(lines),
        "weights": total,
    }


def refuse(folder: Path) -> dict[str, str]:
    """Return what each process says of policies that cannot be built."""
    hidden = make_policy()
    outline = hidden.outline_network

    def without_layers() -> Any:
        network = outline()
        network.get_decoder().blocks = network.get_decoder().layers
        del network.get_decoder().layers
        network.get_decoder()._no_split_modules = None
        return network

    hidden.outline_network = without_layers
    lora = make_policy()
    lora.lora = Lora(rank=2)
    said = {}
    absent = make_policy()  # rank 0 alone reads the checkpoint
    absent.checkpoint = str(folder / "none.ckpt")
    absent.check = lambda request: None
    for name, policy in {"layers": hidden, "lora": lora, "checkpoint": absent}.items():
        try:
            fit(folder, policy=policy, max_steps=1, **strategy_of("fsdp", 2))
        except UserError as error:
            said[name] = str(error)
    return said


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    said: dict[str, Any] = {"refuse": refuse(folder), "load": load(folder, model)}
    said["checkpoint"] = take_checkpoint(folder / "taken", "fsdp")
    for name in ("fsdp", "folder"):
        said[f"resume {name}"] = resume(folder / name, name)
    for gather in (True, False):
        said[f"dynamic {gather}"] = dynamic(folder / "dynamic", gather)
        said[f"everything {gather}"] = everything(folder / f"everything-{gather}", gather)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
