"""Time and peak memory of support head, chunked full head, and full logits with log-softmax.

    python benchmarks/head.py --out runs/head

Measures forward and backward to the hidden states of 4096 tokens under a frozen unembedding, in
float32 on one thread. Each measurement is a process of its own. Time is the least of `--repeats`
runs in each of `--rounds` alternating rounds. Memory is the highest resident size minus that of
weights and inputs. Full heads do not depend on K and are measured once per V and D, in the first
round, twice. Ids follow a log-uniform law (token n about 1/n as frequent as the first, as in text);
`--ids uniform` spreads them over the whole table. Writes `head.md`, `head.csv` and `head.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARIES, SIZES, WIDTHS, TOKENS = (32_000, 152_000, 256_000), (8, 32), (576, 896), 4096
VARIANTS = ("support", "chunked", "logits")
NAMES = {"support": "support head", "chunked": "own chunked full head", "logits": "full logits"}
MEASURED_AT = {"V": 152_000, "K": 32}
"""Where the bounds are to hold: 60x and 10x in time, 1/20 of the memory."""

Cell = dict[str, Any]

# --- one measurement ------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> Cell:
    """Run one variant in this process."""
    import torch

    from lightning_mpo.functional import heads
    from lightning_mpo.functional.head_logits import Head
    from lightning_mpo.memory.resident import resident_bytes

    torch.set_num_threads(cell["threads"])
    torch.manual_seed(0)
    T, K, D, V = cell["T"], cell["K"], cell["D"], cell["V"]
    dtype = getattr(torch, cell["dtype"])
    weight_VD = torch.randn(V, D, dtype=dtype).mul_(D**-0.5)
    hidden_TD = torch.randn(T, D, dtype=dtype).requires_grad_()
    uniform = torch.rand(T, K)
    support_TK = (V * uniform if cell["ids"] == "uniform" else V**uniform - 1).int().clamp(0, V - 1)
    tokens_T = support_TK[:, 0].long()
    head = Head(weight_VD)

    def run() -> Any:
        if cell["variant"] == "support":
            return heads.support_logprobs(hidden_TD, head, tokens_T, support_TK)[0]
        if cell["variant"] == "chunked":
            return heads.full_logprobs(hidden_TD, head, tokens_T, entropy=False)[0]
        return (hidden_TD @ weight_VD.T).float().log_softmax(-1).gather(-1, tokens_T[:, None])

    before, seconds = resident_bytes() / 1024**2, []
    for _ in range(cell["repeats"]):
        started = time.perf_counter()
        run().sum().backward()
        seconds.append(time.perf_counter() - started)
        hidden_TD.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": min(seconds), "peak_mb": peak - before}


def spawn(cell: Cell) -> Cell | None:
    """Run one variant in a process of its own; None where memory would not do."""
    need = (3 * cell["V"] * cell["T"] if cell["variant"] == "logits" else 0) + cell["V"] * cell["D"]
    if 4 * need > 0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        print(
            f"skipped: {cell['variant']} at V = {cell['V']} needs {4 * need / 1e9:.0f} GB",
            file=sys.stderr,
        )
        return None
    environment = os.environ | {"OMP_NUM_THREADS": str(cell["threads"])}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{cell} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- all of them ----------------------------------------------------------------------------------------------------


def cells(options: argparse.Namespace, first: bool) -> list[Cell]:
    """Return what is measured in one round; full heads only in the first."""
    shared = {
        "T": options.tokens,
        "dtype": options.dtype,
        "threads": options.threads,
        "ids": options.ids,
    }
    found = []
    for D in options.widths:
        for V in options.vocabularies:
            for variant in [v for v in options.variants if first or v == "support"]:
                repeats = options.repeats if variant == "support" else min(options.repeats, 2)
                sizes = options.sizes if variant == "support" else options.sizes[:1]
                found += [
                    shared | {"variant": variant, "V": V, "K": K, "D": D, "repeats": repeats}
                    for K in sizes
                ]
    return found


def best(rounds: list[list[Cell]]) -> dict[tuple[str, int, int, int], Cell]:
    """Return the least time and memory of each cell, by (variant, V, K, D)."""
    found: dict[tuple[str, int, int, int], Cell] = {}
    for measured in rounds:
        for cell in measured:
            key = cell["variant"], cell["V"], cell["K"], cell["D"]
            known = found.setdefault(key, {"seconds": cell["seconds"], "peak_mb": cell["peak_mb"]})
            known["seconds"] = min(known["seconds"], cell["seconds"])
            known["peak_mb"] = min(known["peak_mb"], cell["peak_mb"])
    return found


def compare(found: dict[tuple[str, int, int, int], Cell]) -> list[Cell]:
    """Return a row per V, K and D with the ratios of the full heads to the support head."""
    rows = []
    first = min(K for _, _, K, _ in found)  # of full heads, which have no K
    for variant, V, K, D in sorted(found, key=lambda key: (key[3], key[2], key[1])):
        if variant != "support":
            continue
        own = found[variant, V, K, D]
        row: Cell = {
            "D": D,
            "K": K,
            "V": V,
            "support s": own["seconds"],
            "support MB": own["peak_mb"],
        }
        for other in ("chunked", "logits"):
            full = found.get((other, V, first, D))
            row[f"{other} s"] = full and full["seconds"]
            row[f"{other} MB"] = full and full["peak_mb"]
            row[f"{other} / support, time"] = full and full["seconds"] / own["seconds"]
            row[f"support / {other}, memory"] = full and own["peak_mb"] / full["peak_mb"]
        rows.append(row)
    return rows


def verdicts(rows: list[Cell]) -> list[str]:
    """Say of each bound whether it is reached."""
    lines = []
    for row in rows:
        if (
            all(row[name] == value for name, value in MEASURED_AT.items())
            and row["logits s"] is not None
        ):
            for key, bound, better in (
                ("logits / support, time", 60, 1),
                ("chunked / support, time", 10, 1),
                ("support / logits, memory", 1 / 20, -1),
            ):
                good = better * row[key] >= better * bound
                lines.append(
                    f"D = {row['D']}: {key} {row[key]:.3g}, bound {bound:.3g}: {'reached' if good else 'missed'}"
                )
    low, high = (min(row["V"] for row in rows), max(row["V"] for row in rows))
    for row in (row for row in rows if row["V"] == high):
        small = next(r for r in rows if (r["V"], r["K"], r["D"]) == (low, row["K"], row["D"]))
        for key in ("support s", "support MB"):
            ratio = row[key] / small[key]
            good = "reached" if ratio <= 1.1 else "missed"
            lines.append(
                f"D = {row['D']}, K = {row['K']}: {key} at V = {high} / {low} {ratio:.3f}, bound 1.1: {good}"
            )
    return lines


def table(rows: list[Cell]) -> str:
    """Return the rows as Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(_show(row[c]) for c in columns) + " |" for row in rows)]
    )


def _show(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}"


def draw(rows: list[Cell], path: Path) -> None:
    """Draw time and memory over V, a panel each, at the largest D and K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    D, K = max(row["D"] for row in rows), max(row["K"] for row in rows)
    chosen = [row for row in rows if (row["D"], row["K"]) == (D, K)]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, unit, label in zip(
        panels, ("s", "MB"), ("forward + backward, s", "peak memory, MB"), strict=True
    ):
        for variant in VARIANTS:
            points = [
                (row["V"], row[f"{variant} {unit}"])
                for row in chosen
                if row[f"{variant} {unit}"] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=NAMES[variant])
        axes.set(
            xlabel="vocabulary V",
            ylabel=label,
            yscale="log",
            title=f"T = {TOKENS}, D = {D}, K = {K}",
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="V")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="K, of the support")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="D, of the hidden states"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="only these"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="T")
    parser.add_argument(
        "--repeats", type=int, default=7, help="runs of a process; full heads take two at most"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="processes of the support head, in alternation"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weight and states"
    )
    parser.add_argument(
        "--ids",
        choices=("text", "uniform"),
        default="text",
        help="how ids are spread over the table",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/head"), help="folder of table and picture"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell))))
        return
    rounds: list[list[Cell]] = []
    for number in range(options.rounds):
        rounds.append([])
        for cell in cells(options, number == 0):
            result = spawn(cell)
            if result is not None:
                rounds[-1].append(cell | result)
                print(json.dumps(rounds[-1][-1]), file=sys.stderr, flush=True)
    rows = compare(best(rounds))
    text = "\n".join([table(rows), "", *verdicts(rows)])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "head.md").write_text(text + "\n")
    with (options.out / "head.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / "head.png")
    print(text)
    print(f"wrote {options.out / 'head.md'} and {options.out / 'head.png'}")


if __name__ == "__main__":
    main()
