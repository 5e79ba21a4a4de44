"""Random kills of every stage, objective and callback with a state: prints a row for each.

`python tests/support/many_kills.py FOLDER [--kills 20] [--seed 0] [FAMILY ...]` exits 1 where a run is not bit for bit.

Each family is an undisturbed run of the command line, and runs that are killed up to three times at random events and
times, as `lightning-mpo verify-resume --kills` does with a configuration of one's own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lightning_mpo.cli.forked_runs import Runs  # noqa: E402
from lightning_mpo.cli.verify_resume import verify_often  # noqa: E402
from lightning_mpo.rewards.base import Completion, Reward  # noqa: E402

BASE = """
seed_everything: 0
model:
  class_path: PolicyOptimization
  init_args:
    policy:
      class_path: TinyPolicy
      init_args: {hidden_size: 32, layers: 2, heads: 2}
    objective:
      support: FullVocabulary
      actions: TokenActions
      advantage: GroupRelative
      surrogate: ClippedRatio
      selection: AllTokens
      reduction: TokenMean
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-3}}
    scheduler:
      class_path: torch.optim.lr_scheduler.LinearLR
      init_args: {start_factor: 1.0, end_factor: 0.1, total_iters: 8}
data:
  class_path: Arithmetic
  init_args: {digits: 2, train_problems: 12, held_out_problems: 4}
rollout:
  rewards: [tests.support.many_kills.LowFirst, tests.support.runs.Digits]
  prompts: 4
  completions: 4
  max_new_tokens: 8
  minibatches: 2
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 8
  limit_val_batches: 1
  num_sanity_val_steps: 0
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  log_every_n_steps: 1
"""
ADAPTIVE = """
model:
  init_args:
    objective:
      terms:
        - class_path: KLPenalty
          init_args:
            controller: {class_path: AdaptiveCoefficient, init_args: {target: 0.01, coefficient: 0.1, horizon: 16}}
            estimator: k3
            place: loss
"""
CALLBACKS = """
trainer:
  callbacks+:
    - KLTracking
    - {class_path: ReferenceUpdate, init_args: {every: 1, mixup: 0.5}}
    - Watchdog
    - {class_path: Samples, init_args: {every: 1, show: false}}
    - {class_path: SupportOverlap, init_args: {every: 1, rows: 4}}
    - Throughput
    - {class_path: EarlyStopping, init_args: {monitor: val/reward, mode: max, patience: 9}}
    - {class_path: ModelCheckpoint, init_args: {monitor: val/reward, mode: max, save_top_k: 2, save_last: true}}
    - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 3, save_top_k: -1}}
"""
HEADS = """
trainer:
  callbacks+:
    - {class_path: HeadDiagnostics, init_args: {every: 2, rows: 4}}
"""
REPORT = """
trainer:
  callbacks+:
    - {class_path: Report, init_args: {problems: 4, completions: 2, batch_size: 4}}
"""
AVERAGE = """
trainer:
  callbacks+:
    - {class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}
"""
REPLAY = "rollout: {replay: {class_path: PrefixReplay, init_args: {share: 0.5}}}\n"
SCAFFOLDS = """
data:
  class_path: Scaffolded
  init_args:
    base: {class_path: Arithmetic, init_args: {digits: 2, train_problems: 12, held_out_problems: 4}}
    splitter: {class_path: Delimiters}
"""
WARMUP = """
seed_everything: 0
model:
  class_path: SupervisedWarmup
  init_args:
    policy: {class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 2, heads: 2}}
    batch_size: 4
    batches_per_epoch: 6
data: {class_path: Arithmetic, init_args: {digits: 1, train_problems: 12, held_out_problems: 4}}
trainer:
  accelerator: cpu
  devices: 1
  limit_val_batches: 1
  num_sanity_val_steps: 0
  accumulate_grad_batches: 2
  log_every_n_steps: 1
  callbacks+:
    - {class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 9}}
    - {class_path: ModelCheckpoint, init_args: {monitor: val/loss, save_top_k: 2}}
"""
MASKED = """
model:
  init_args:
    policy: {class_path: TinyMaskedPolicy, init_args: {hidden_size: 32, layers: 2, heads: 2}}
"""
MASKED_WARMUP = MASKED + "    likelihood: {canvas: 12}\n"
DIFFUSION = (
    MASKED
    + "rollout: {sampler: {class_path: DiffusionSampler, init_args: {block: 4, tokens_per_step: 2}}}\n"
)
HEAD_WARMUP = (
    WARMUP.replace("SupervisedWarmup", "HeadWarmup")
    .replace("val/loss", "val/cross_entropy")
    .replace("heads: 2}", "heads: 2, mtp: ParallelHeads}")
    .replace(
        "    batch_size: 4\n",
        "    pool: {prompts: 4, completions: 2, max_new_tokens: 6, passes: 4}\n",
    )
)


def algorithm(name: str, *more: Path | str) -> list[Path | str]:
    """Return an algorithm's layers, with the models that its file says it needs (`-c mtp`)."""
    path = ROOT / f"configs/algorithm/{name}.yaml"
    if re.search(r"^ +likelihood:(?! null)", path.read_text(), re.MULTILINE):
        return [BASE, path, DIFFUSION, *more]
    models = [
        ROOT / f"configs/model/{model}.yaml" for model in re.findall(r"-c (\w+)", path.read_text())
    ]
    return [BASE, path, *models, *more]


FAMILIES: dict[str, list[Path | str]] = {
    "SupervisedWarmup": [WARMUP],
    "SupervisedWarmup masked": [WARMUP, MASKED_WARMUP],
    "HeadWarmup": [HEAD_WARMUP],
    "callbacks": [BASE, ADAPTIVE, CALLBACKS.replace("    - {class_path: SupportOverlap, init_args: {every: 1, rows: 4}}\n", "")],
    "callbacks on supports": algorithm("mpo_backbone_rlpt", ADAPTIVE, CALLBACKS),
    "callbacks on heads": algorithm("mpo", HEADS),
    "Report": [BASE, REPORT],
    "Scaffolded": [BASE, SCAFFOLDS],
    "EMAWeightAveraging": [BASE, AVERAGE],
    "t_spmo with replay": algorithm("t_spmo", REPLAY),
    **{path.stem: algorithm(path.stem) for path in sorted((ROOT / "configs/algorithm").glob("*.yaml"))},
}  # fmt: skip


class LowFirst(Reward):
    """Right where the first character is a digit below 5, so that groups are mixed."""

    is_accuracy = True

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(done.text[:1] in list("01234")) for done in completions]


def arguments_of(folder: Path, layers: list[Path | str]) -> list[str]:
    """Return `-c` options; texts are written to files."""
    found: list[str] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, str):
            path = folder / f"layer-{i}.yaml"
            path.write_text(layer)
            layer = path
        found += ["-c", str(layer)]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("many_kills.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    bad = 0
    with Runs([], options.updates) as runs:
        for name in options.families or FAMILIES:
            folder = options.folder / name.replace(" ", "-")
            folder.mkdir(parents=True)
            runs.arguments, runs.seconds = arguments_of(folder, FAMILIES[name]), 0.0
            said, started = io.StringIO(), time.perf_counter()
            with contextlib.redirect_stdout(said):
                status = verify_often(runs, options.kills, options.seed, folder)
            bad += status
            lines = said.getvalue().splitlines()
            print(f"{name:22s}  {lines[-1]}  ({time.perf_counter() - started:.0f} s)", flush=True)
            print(
                "".join(f"    {line}\n" for line in lines if status and "bit for bit" not in line),
                end="",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
