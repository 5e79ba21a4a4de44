"""Records numbers that a change of structure must not alter, and compares two records bit for bit.

    python benchmarks/behaviour.py record before.json
    python benchmarks/behaviour.py record after.json
    python benchmarks/behaviour.py compare before.json after.json     # exits 1 where a number differs

A record holds for each algorithm file: its objective line, the logged metrics of four updates, and
the digests of weights and optimiser moments at their end. It holds the same after a stop and a
resume. The quickstart adds its warm-up's weights, and completions and metrics of its first two
rollouts. Numbers depend on how a CPU rounds, so both records come from one machine. Everything goes
through the command line and the files of a run: names of modules and classes may move.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]

import torch  # noqa: E402

BASE = """
seed_everything: 0
model:
  class_path: PolicyOptimization
  init_args:
    policy: {class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 2, heads: 2}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-3}}
data: {class_path: Arithmetic, init_args: {digits: 2, train_problems: 12, held_out_problems: 4}}
rollout:
  rewards: [{class_path: FunctionReward, init_args: {function: "REWARD", accuracy: true}}]
  reward_process: false
  prompts: 4
  completions: 4
  max_new_tokens: 8
  minibatches: 2
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 4
  default_root_dir: run
  limit_val_batches: 1
  num_sanity_val_steps: 0
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  enable_progress_bar: false
  logger: {class_path: CSVLogger, init_args: {save_dir: run, name: null, version: ""}}
  callbacks:
    - {class_path: Samples, init_args: {every: 1, count: 16, show: false}}
    - {class_path: ModelCheckpoint, init_args: {dirpath: run, every_n_train_steps: 1, save_last: true}}
"""
MASKED = """
model: {init_args: {policy: {class_path: TinyMaskedPolicy, init_args: {hidden_size: 32, layers: 2, heads: 2}}}}
rollout: {sampler: {class_path: DiffusionSampler, init_args: {block: 4, tokens_per_step: 2}}}
"""
TIMES = ("time/", "throughput/", "memory/")


def low_first(completions: list[str], **columns: Any) -> list[float]:
    """Return 1 where the first character is a digit below 5: groups of an untrained policy are mixed."""
    return [float(text[:1] in list("01234")) for text in completions]


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    """Collect what is printed, and what Lightning's loggers print, instead of showing it."""
    text = io.StringIO()
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")
    ]
    handlers = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.StreamHandler(text)]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield text
    finally:
        for logger, before in zip(loggers, handlers, strict=True):
            logger.handlers = before


def fit(*arguments: object) -> str:
    """Run `lightning-mpo fit` in this process and return all that it printed."""
    from lightning_mpo import cli

    with printed() as text:
        status = cli.run(["fit", *map(str, arguments)])
    if status:
        raise SystemExit(
            f"fit {' '.join(map(str, arguments))} exits with {status}:\n{text.getvalue()}"
        )
    return text.getvalue()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors within dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def digests(value: Any) -> list[str]:
    """Return digests of all tensors, in order of their text: names of modules may change."""
    contents = (
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for tensor in tensors(value)
    )
    return sorted(hashlib.sha256(content).hexdigest()[:16] for content in contents)


def metrics(path: Path, updates: int) -> dict[str, list[str]]:
    """Return the logged values of the first updates by metric, without times; spaces and `@` in names do not count."""
    rows = [row for row in csv.DictReader(path.open()) if int(row["step"]) < updates]
    names = [name for name in rows[0] if not name.startswith(TIMES)]
    columns = {name: [row[name] for row in rows if row[name] != ""] for name in names}
    return {
        name.replace("@", "_at_").replace(" ", "_"): values
        for name, values in columns.items()
        if values
    }


def checkpoint(path: Path) -> dict[str, list[str]]:
    """Return the digests of a checkpoint's weights and of its optimiser's moments."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    moments = [state["state"] for state in saved["optimizer_states"]]
    return {"weights": digests(saved["state_dict"]), "moments": digests(moments)}


def digest_of_lines(path: Path, key: str, count: int) -> str:
    """Return a digest of one entry of the first lines of a JSONL file."""
    values = [json.loads(line)[key] for line in path.read_text().splitlines()[:count]]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def algorithm(path: Path) -> dict[str, Any]:
    """Return the record of an algorithm file, run in the current folder."""
    models = [
        ROOT / f"configs/model/{name}.yaml" for name in re.findall(r"-c (\w+)", path.read_text())
    ]
    layers: list[object] = ["-c", "base.yaml", "-c", path]
    for model in models:
        layers += ["-c", model]
    if re.search(r"^ +likelihood:(?! null)", path.read_text(), re.MULTILINE):
        Path("masked.yaml").write_text(MASKED)
        layers += ["-c", "masked.yaml"]
    printed = fit(*layers)
    objective = re.search(r"^objective +(.*(?:\n {8,}.*)*)", printed, re.MULTILINE)
    record: dict[str, Any] = {
        "objective": " ".join(objective[1].split()) if objective else None,
        "metrics": metrics(Path("run/metrics.csv"), 4),
        "completions": digest_of_lines(Path("run/completions/rollouts.jsonl"), "completion", 16),
        **checkpoint(Path("run/last.ckpt")),
    }
    Path("run").rename("whole")
    fit(*layers, "--trainer.max_steps", 3)
    fit(*layers, "--ckpt_path", "last")
    record["resumed"] = checkpoint(Path("run/last.ckpt"))
    return record


def quickstart() -> dict[str, Any]:
    """Return the record of the quickstart's first two rollouts, which are 16 updates."""
    fit("-c", "quickstart", "--trainer.max_steps", 16, "--trainer.limit_val_batches", 0)
    run = Path("runs/quickstart")
    warmup = torch.load(run / "warmup-seed0" / "last.ckpt", map_location="cpu", weights_only=True)
    return {
        "warm-up": digests(warmup["state_dict"]),
        "metrics": metrics(run / "metrics.csv", 16),
        "completions": digest_of_lines(run / "completions" / "rollouts.jsonl", "completion", 4),
        **checkpoint(run / "checkpoints" / "last.ckpt"),
    }


def record(names: list[str]) -> dict[str, Any]:
    """Return the records of algorithm files, and of `quickstart`, by name; each runs in a folder that is removed."""
    records: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("base.yaml").write_text(
                BASE.replace("REWARD", f"{Path(__file__).resolve()}:low_first")
            )
            path = ROOT / "configs" / "algorithm" / f"{name}.yaml"
            records[name] = quickstart() if name == "quickstart" else algorithm(path)
        print(f"{name}: {len(records[name]['weights'])} weights", file=sys.stderr, flush=True)
    return records


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in before or key not in after:
                yield f"{place}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif before != after:
        yield f"{place}: {str(before)[:160]} | {str(after)[:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument(
        "names", nargs="*", help="algorithm files and `quickstart`; all by default"
    )
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.verb == "compare":
        lines = list(
            differences(*(json.loads(path.read_text()) for path in (options.before, options.after)))
        )
        print("\n".join(lines) or "the records are equal")
        return int(bool(lines))
    every = [path.stem for path in sorted((ROOT / "configs" / "algorithm").glob("*.yaml"))]
    options.file.write_text(json.dumps(record(options.names or [*every, "quickstart"]), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
