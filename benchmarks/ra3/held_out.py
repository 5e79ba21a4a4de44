"""Cross-entropy of held-out code, in nats a token, of several policies on the same windows.

    python benchmarks/ra3/held_out.py -c ra3_m_step --data.init_args.paths '[annotated]' \\
        --checkpoint plain=none --checkpoint ra3=RUN/last.ckpt --out runs/ra3_held_out

Windows are those that `lightning-mpo validate` takes, and the means are its metrics: code without
thoughts, code in windows with their thoughts, and thoughts. Differences are to the first policy,
window by window. `none` is the model without training. Intervals are 95 %, with the file as the
unit. Each policy has a file with a row for each window; a command that was stopped continues there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import named, parsed, parser, read
from records import resume
from tables import interval

from lightning_mpo.data.code_windows import BEHIND_THOUGHTS, PLAIN, THOUGHTS, CodeWindows
from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.types import PromptRow

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import add_threads, print_table, run, write_csv

PARTS = (PLAIN, BEHIND_THOUGHTS, THOUGHTS)
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    options, rest = parse(argv)
    torch.set_num_threads(options.threads)
    checkpoints = named(options.checkpoint)
    policies, data = load(options, checkpoints, rest)
    about = {"config": options.config, "rest": rest, "dtype": options.dtype}
    about["windows"] = digest(data.validation_rows)
    records = {}
    for name, checkpoint in checkpoints.items():
        mine = about | {"checkpoint": str(checkpoint), "saved": saved(checkpoint)}
        path = options.out / f"{name}.jsonl"
        records[name] = measure(policies.pop(name), data, path, mine)
    show(records, options.out)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    made = parser(__doc__, "M-step: its policy and data", Path("runs/ra3_held_out"))
    add_threads(made)
    return parsed(made, argv)


def load(
    options: argparse.Namespace, checkpoints: Mapping[str, Path | None], rest: Sequence[str]
) -> tuple[dict[str, CausalPolicy], CodeWindows]:
    """Return the policies and the connected data; no weights are loaded."""
    policies, data = read("held_out.py", options, checkpoints, rest, CodeWindows, "ra3_m_step")
    first = next(iter(policies.values()))
    data.connect(first.tokenizer, first.end_tokens)
    data.check_solutions(first.positions)
    if not data.validation_rows:
        raise UserError("there are no held-out windows; raise `data.validation_share`")
    return policies, data


def digest(rows: Sequence[PromptRow]) -> str:
    """Return a hash of the windows: results of other windows are no pairs."""
    windows = [row.extra["window"] for row in rows]
    text = repr([(window.before, window.ids, window.kinds) for window in windows])
    return hashlib.sha256(text.encode()).hexdigest()


def saved(checkpoint: Path | None) -> int | None:
    """Return the time at which a checkpoint was written, as a run replaces its `last.ckpt`."""
    return None if checkpoint is None else checkpoint.stat().st_mtime_ns


# --- measuring ------------------------------------------------------------------------------------


def measure(
    policy: CausalPolicy, data: CodeWindows, path: Path, about: Mapping[str, Any]
) -> list[Record]:
    """Score the windows batch by batch; each one is a record at once in the file."""
    rows, batch = data.validation_rows, data.validation_batch_size
    records = resume(path, about, len(rows), batch)
    if len(records) == len(rows):
        return records
    policy.build(device=torch.device("cpu"), reference=False)
    with path.open("a") as file:
        for start in range(len(records), len(rows), batch):
            for record in scored(policy, data, rows[start : start + batch]):
                records.append(record)
                file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{path.stem}: {len(records)} of {len(rows)} windows", flush=True)
    return records


def scored(policy: CausalPolicy, data: CodeWindows, rows: Sequence[PromptRow]) -> Iterator[Record]:
    """Yield for each window the sum of -log π over its tokens of each part, and their number."""
    solutions = data.solutions(rows)
    with rollout_mode(policy):
        scores = policy.score(solutions, solutions.response_mask_BT, temperature=1.0)
    nats_BT = -scores.logprobs_BT.double()
    parts = data.token_parts(rows)
    sums = {name: (nats_BT * part_BT).sum(-1).tolist() for name, part_BT in parts.items()}
    counts = {name: part_BT.sum(-1).tolist() for name, part_BT in parts.items()}
    for b, row in enumerate(rows):
        present = [name for name in parts if counts[name][b]]
        yield {
            "window": row.where,
            "file": row.where.rpartition(":")[0],
            "nats": {name: sums[name][b] for name in present},
            "tokens": {name: counts[name][b] for name in present},
        }


# --- tables ---------------------------------------------------------------------------------------


def means(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return a row for each policy and part of the tokens: their mean, in nats."""
    rows = []
    for name, mine in records.items():
        for part in PARTS:
            having = [record for record in mine if part in record["nats"]]
            values = [(r["file"], r["nats"][part], r["tokens"][part]) for r in having]
            rows += _row({"policy": name, "part": part}, "nats", values)
    return rows


def differences(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return rows of paired differences, in nats a token.

    There are two kinds: each policy less the first one on the same tokens, and for one policy the
    code of windows with their thoughts less the same code without.
    """
    rows = []
    first, *others = records
    for other, part in ((other, part) for part in PARTS for other in others):
        pairs = [
            (ours["file"], ours["nats"][part] - theirs["nats"][part], ours["tokens"][part])
            for ours, theirs in zip(records[other], records[first], strict=True)
            if part in ours["nats"]
        ]
        rows += _row({"difference": f"{other} - {first}", "part": part}, "mean", pairs)
    for name, mine in records.items():
        plain = {record["window"]: record for record in mine if PLAIN in record["nats"]}
        behind = [record for record in mine if BEHIND_THOUGHTS in record["nats"]]
        pairs = [
            (
                record["file"],
                record["nats"][BEHIND_THOUGHTS] - plain[record["window"]]["nats"][PLAIN],
                record["tokens"][BEHIND_THOUGHTS],
            )
            for record in behind
        ]
        rows += _row({"difference": name, "part": f"{BEHIND_THOUGHTS} - {PLAIN}"}, "mean", pairs)
    return rows


def _row(
    names: dict[str, Any], column: str, values: Sequence[tuple[str, float, int]]
) -> list[dict[str, Any]]:
    """Return a row with a mean and its interval; none without values."""
    if not values:
        return []
    sizes = {
        "windows": len(values),
        "files": len({file for file, _, _ in values}),
        "tokens": sum(count for _, _, count in values),
    }
    return [names | sizes | interval(column, values)]


def show(records: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Print the tables and write them."""
    for name, table in (("means", means(records)), ("differences", differences(records))):
        if table:
            print()
            print_table(table)
            write_csv(table, folder, name)


if __name__ == "__main__":
    run(main)
