"""Peak memory of an update against the noised copies of a response, for masked policies.

    python benchmarks/masked/copies_memory.py --out runs/copies_memory --picture docs/diffusion/memory.png

A BERT with random weights is trained for one update on a rollout. `Elbo` (BGPO) and `Denoising`
(AGRPO) give each copy a row of its own. The number of micro-batches grows with the copies, so each
has the rows of one copy. `CoupledElbo` (ESPO) takes the mean over the copies of a row. The backward
pass computes these again, one at a time. For contrast, `Elbo` is also measured with all rows in one
micro-batch. Each measurement is a process of its own on the CPU. Peaks are those of
`MemoryAccounting`: bytes in use above the process before the policy is loaded. The script writes
`copies_memory.md` and `copies_memory.csv`. Its exit code is 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COPIES = (2, 4, 8, 16)
BOUNDS = {"Elbo": 1.1, "Denoising": 1.1, "CoupledElbo": 1.2}
"""Most memory at the most copies, as a multiple of that at the fewest."""
CONTRAST = "Elbo, one micro-batch"
LABELS = {
    "Elbo": "BGPO (Elbo)",
    "Denoising": "AGRPO (Denoising)",
    "CoupledElbo": "ESPO (CoupledElbo)",
    CONTRAST: "Elbo, all copies in one micro-batch",
}
MIB = 2**20

Cell = dict[str, Any]

# --- one measurement ------------------------------------------------------------------------------


def measure(cell: Cell) -> Cell:
    """Train for one update in this process; return its peaks in bytes."""
    import lightning as L
    import torch

    from lightning_mpo.callbacks import MemoryAccounting, RolloutLoop
    from lightning_mpo.data.arithmetic import Arithmetic
    from lightning_mpo.modules import PolicyOptimization
    from lightning_mpo.policies import TinyMaskedPolicy
    from lightning_mpo.sampling import DiffusionSampler

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    canvas, width = cell["canvas"], cell["width"]
    # modules that a build imports are in memory before the measurement
    TinyMaskedPolicy(hidden_size=8, layers=1, heads=1).build(
        device=torch.device("cpu"), reference=False
    )
    policy = TinyMaskedPolicy(
        hidden_size=width, layers=cell["layers"], heads=max(1, width // 64), max_length=canvas + 32
    )
    loop = RolloutLoop(
        [share_of_ones],
        prompts=1,
        completions=cell["rows"],
        max_new_tokens=canvas,
        sampler=DiffusionSampler(block=canvas // 4, tokens_per_step=max(1, canvas // 8)),
        parity_gate=False,
    )
    memory = MemoryAccounting(write=False)
    memory.heap_every = 1
    module = PolicyOptimization(
        policy, make_objective(cell), optimizer=lambda w: torch.optim.AdamW(w, lr=1e-5)
    )
    own_rows = cell["variant"] in ("Elbo", "Denoising")
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            accumulate_grad_batches=cell["copies"] if own_rows else 1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[loop, memory],
        )
        trainer.fit(module, datamodule=Arithmetic(digits=2, train_problems=8, held_out_problems=2))
    peaks = {phase: peak.in_use - memory.baseline for phase, peak in memory.watch.peaks.items()}
    return {
        "peak": max(peaks.values()),
        "phases": peaks,
        "weights": sum(w.numel() * w.element_size() for w in policy.parameters()),
    }


def share_of_ones(completions: Sequence[str], **_: Any) -> list[float]:
    """Return a reward that differs between random responses."""
    return [text.count("1") / max(len(text), 1) for text in completions]


def make_objective(cell: Cell) -> Any:
    """Return the objective of BGPO, AGRPO or ESPO with as many copies."""
    from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
    from lightning_mpo.objective.advantages import GroupRelative
    from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
    from lightning_mpo.objective.linear_bound import LinearBound
    from lightning_mpo.objective.objective import Objective
    from lightning_mpo.objective.reductions import ConstantLength, SequenceMean
    from lightning_mpo.objective.selection import AllTokens
    from lightning_mpo.objective.supports import FullVocabulary
    from lightning_mpo.objective.surrogates import ClippedRatio

    kind, copies = cell["variant"].partition(",")[0], cell["copies"]
    actions, surrogate, reduction, likelihood = {
        "Elbo": (SequenceActions(mean=False), LinearBound(), SequenceMean(), Elbo(copies)),
        "Denoising": (TokenActions(), ClippedRatio(), ConstantLength(1), Denoising(copies)),
        "CoupledElbo": (
            SequenceActions(mean=True),
            ClippedRatio(),
            SequenceMean(),
            CoupledElbo(copies // 2),
        ),
    }[kind]
    return Objective(
        FullVocabulary(),
        actions,
        GroupRelative(),
        surrogate,
        AllTokens(),
        reduction,
        likelihood=likelihood,
    )


def spawn(cell: Cell) -> Cell:
    """Measure in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{cell} failed:\n{done.stderr[-2000:]}")
    return cell | json.loads(done.stdout.strip().splitlines()[-1])


# --- all of them ----------------------------------------------------------------------------------


def compare(cells: list[Cell]) -> list[Cell]:
    """Return a row per variant: its peaks in MiB by copies, and the most over the fewest copies."""
    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        peaks = {c["copies"]: c["peak"] / MIB for c in cells if c["variant"] == variant}
        fewest, most = min(peaks), max(peaks)
        row: Cell = {"likelihood": variant, "bound": BOUNDS.get(variant)}
        row |= {f"{copies} copies, MiB": peak for copies, peak in peaks.items()}
        rows.append(row | {"most / fewest": peaks[most] / peaks[fewest]})
    return rows


def verdicts(rows: list[Cell]) -> list[str]:
    """Return a line for each bound, with `reached` or `missed` at its end."""
    return [
        f"{row['likelihood']}: {row['most / fewest']:.3f} times the memory of the fewest copies, "
        f"bound {row['bound']}: {'reached' if row['most / fewest'] <= row['bound'] else 'missed'}"
        for row in rows
        if row["bound"] is not None
    ]


def table(rows: list[Cell]) -> str:
    """Return the rows as Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [*(name for name in columns if name not in ("most / fewest", "bound"))]
    columns += ["most / fewest", "bound"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(_show(row.get(c)) for c in columns) + " |" for row in rows)]
    )


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if value > 10 else f"{value:.3g}"


def draw(cells: list[Cell], path: Path) -> None:
    """Plot the peaks against the copies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        points = sorted((c["copies"], c["peak"] / MIB) for c in cells if c["variant"] == variant)
        look = {"color": "tab:gray", "linestyle": ":"} if variant == CONTRAST else {}
        axes.plot(*zip(*points, strict=True), marker="o", label=LABELS[variant], **look)
    axes.set(xscale="log", xlabel="noised copies of a response", ylabel="peak of an update, MiB")
    axes.set_ylim(bottom=0)
    ticks = sorted({cell["copies"] for cell in cells})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Measure all variants; return 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, nargs="+", default=COPIES, help="even numbers")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--canvas", type=int, default=128, help="tokens; a multiple of 4")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--out", type=Path, default=Path("runs/copies_memory"), help="a folder")
    parser.add_argument("--picture", type=Path, help="picture to write")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell))))
        return 0
    # measure
    sizes = {name: getattr(options, name) for name in ("rows", "canvas", "layers", "width")}
    plan = [(variant, n) for variant in BOUNDS for n in options.copies]
    plan += [(CONTRAST, n) for n in options.copies if n < max(options.copies)]
    cells = []
    for variant, copies in plan:
        cells.append(spawn(sizes | {"variant": variant, "copies": copies}))
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    # tables and picture
    rows = compare(cells)
    lines = verdicts(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "copies_memory.md").write_text("\n".join([table(rows), "", *lines]) + "\n")
    with (options.out / "copies_memory.csv").open("w", newline="") as file:
        names = ("variant", "copies", *sizes, "peak", "weights")
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cells)
    if options.picture:
        draw(cells, options.picture)
    print("\n".join([table(rows), "", *lines]))
    return int(any(line.endswith("missed") for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
