"""Savings at the head from learning on a part of the tokens, and the cost of every surrogate.

    python benchmarks/selection.py --out runs/selection

Head: forward and backward to the hidden states of 4096 tokens under a frozen unembedding, in
float32 on one thread. Three variants are compared: all tokens through the chunked head, 40 % of
them through the same head, and the logits of all tokens at once. The 40 % are chosen by chance, as
in S-GRPO; the paper (arXiv:2504.20834) compares with the third. Each measurement is a process of
its own, in alternating rounds. Time is the least over rounds. Memory is the least of the highest
resident sizes, minus that of weights and inputs. Surrogates: loss and gradient of 32 x 96
log-ratios, least of many runs, against the CPU seconds of a whole step (benchmarks/rlpt/step.py).
Writes `selection.md`, `selection.csv` and `surrogates.csv`.
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

VOCABULARIES, WIDTHS, TOKENS, SHARE = (49_152, 152_000), (576,), 4096, 0.4
VARIANTS = ("all", "sampled", "logits")
TIME, MEMORY, COST = 0.45, 1.0, 0.001
"""Bounds: time and memory of 40 % against all tokens, and a surrogate's share of a step."""
STEP_SECONDS = 29.5
"""CPU seconds of a step of GRPO with SmolLM2: 32 responses of 96 tokens, two updates, one thread."""

Cell = dict[str, Any]

# --- one measurement ------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> Cell:
    """Run one variant in this process."""
    import torch

    from lightning_mpo.functional import heads
    from lightning_mpo.functional.head_logits import Head
    from lightning_mpo.memory.resident import resident_bytes
    from lightning_mpo.objective.selection import SampledTokens

    torch.set_num_threads(cell["threads"])
    torch.manual_seed(0)
    T, D, V = cell["T"], cell["D"], cell["V"]
    weight_VD = torch.randn(V, D).mul_(D**-0.5)
    hidden_TD = torch.randn(T, D).requires_grad_()
    tokens_T = torch.randint(0, V, (T,))
    selection = SampledTokens(prefix=0, cap=None, probability=cell["share"])
    chosen_T = (
        selection.choose(torch.ones(1, T, dtype=torch.bool), torch.Generator().manual_seed(1))[0]
        > 0
    )

    head = Head(weight_VD)

    def run() -> Any:
        if cell["variant"] == "logits":
            return (hidden_TD @ weight_VD.T).float().log_softmax(-1).gather(-1, tokens_T[:, None])
        mask_T = chosen_T if cell["variant"] == "sampled" else None
        return heads.full_logprobs(hidden_TD, head, tokens_T, mask_BT=mask_T, entropy=False)[0]

    before, seconds = resident_bytes() / 1024**2, []
    for _ in range(cell["repeats"]):
        started = time.perf_counter()
        run().sum().backward()
        seconds.append(time.perf_counter() - started)
        hidden_TD.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": min(seconds),
        "peak_mb": peak - before,
        "chosen": chosen_T.float().mean().item(),
    }


def measure_surrogates(repeats: int) -> list[Cell]:
    """Time loss and gradient of every surrogate over 32 x 96 actions."""
    import torch

    from lightning_mpo.objective import surrogates as S
    from lightning_mpo.objective.action_spaces import Actions, GroupTerms, TokenTerms
    from lightning_mpo.objective.divergence_mask import DivergenceMask
    from lightning_mpo.objective.linear_bound import LinearBound
    from lightning_mpo.objective.position_clip import PositionClip
    from lightning_mpo.objective.preferences import PairwiseLogistic

    torch.set_num_threads(1)
    torch.manual_seed(0)
    log_ratios = torch.randn(32, 96).mul_(0.1).requires_grad_()
    advantages, mask = torch.randn(32, 1).expand(32, 96), torch.ones(32, 96, dtype=torch.bool)
    anchor, entropy = torch.full((32, 96), -1.0), torch.rand(32, 96)
    chosen = [
        S.PolicyGradient(),
        S.ClippedRatio(),
        S.ClippedRatio(dual=3.0),
        S.ClippedWeight(),
        S.AsymmetricRatio(),
        S.AsymmetricRatio(wide=0.4),
        S.BoundedTokens(),
        LinearBound(),
        PositionClip(),
        DivergenceMask(),
        DivergenceMask(divergence="kl"),
        PairwiseLogistic(),
    ]
    group_B = torch.arange(32) // 8
    rows = []
    for surrogate in chosen:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            bounded = surrogate.bound(log_ratios, advantages)
            tokens = TokenTerms(bounded + anchor, anchor, entropy)
            group = GroupTerms(bounded, group_B)
            actions = Actions(bounded, advantages, mask, mask.float(), tokens, group=group)
            losses = surrogate.loss(actions)
            torch.autograd.grad(losses.sum(), log_ratios)
            seconds.append(time.perf_counter() - started)
        options = ", ".join(f"{k}={v}" for k, v in vars(surrogate).items())
        row = {
            "surrogate": f"{type(surrogate).__name__}({options})",
            "microseconds": 1e6 * min(seconds),
        }
        rows.append(row | {"share of a step": min(seconds) / STEP_SECONDS})
    return rows


def spawn(cell: Cell) -> Cell | None:
    """Run one variant in a process of its own; None where memory would not do."""
    need = 4 * (
        (3 * cell["V"] * cell["T"] if cell["variant"] == "logits" else 0) + cell["V"] * cell["D"]
    )
    if need > 0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        print(
            f"skipped: {cell['variant']} at V = {cell['V']} needs {need / 1e9:.0f} GB",
            file=sys.stderr,
        )
        return None
    environment = os.environ | {"OMP_NUM_THREADS": str(cell["threads"])}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{cell} failed:\n{done.stderr[-2000:]}")
    return cell | json.loads(done.stdout.strip().splitlines()[-1])


# --- all of them ----------------------------------------------------------------------------------------------------


def compare(cells: list[Cell]) -> list[Cell]:
    """Return a row per V and D: least time and memory of each variant, and those of 40 % as shares of the others'."""
    rows = []
    for V, D in sorted({(cell["V"], cell["D"]) for cell in cells}):
        row: Cell = {"V": V, "D": D}
        for variant in VARIANTS:
            own = [
                cell for cell in cells if (cell["V"], cell["D"], cell["variant"]) == (V, D, variant)
            ]
            row[f"{variant} s"] = min((cell["seconds"] for cell in own), default=None)
            row[f"{variant} MB"] = min((cell["peak_mb"] for cell in own), default=None)
        for other in ("all", "logits"):
            for unit, name in (("s", "time"), ("MB", "memory")):
                base = row[f"{other} {unit}"]
                row[f"sampled / {other}, {name}"] = base and row[f"sampled {unit}"] / base
        rows.append(row)
    return rows


def verdicts(rows: list[Cell], surrogates: list[Cell]) -> list[str]:
    """Say of each bound whether it is reached."""
    lines = []
    for row in rows:
        for name, bound in (("time", TIME), ("memory", MEMORY)):
            ratio = row[f"sampled / all, {name}"]
            good = "reached" if ratio <= bound else "missed"
            lines.append(
                f"V = {row['V']}, D = {row['D']}: {name} {ratio:.3f} of all tokens, bound {bound}: {good}"
            )
    most = max(surrogates, key=lambda row: row["share of a step"])
    share = most["share of a step"]
    good = "reached" if share < COST else "missed"
    return [
        *lines,
        f"dearest surrogate {most['surrogate']}: {share:.2e} of a step, bound {COST}: {good}",
    ]


def table(rows: list[Cell]) -> str:
    """Return the rows as Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(_show(row[c]) for c in columns) + " |" for row in rows)]
    )


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: list[Cell]) -> None:
    """Write the rows as csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="V")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="D, of the hidden states"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="T")
    parser.add_argument("--share", type=float, default=SHARE, help="of the tokens that learn")
    parser.add_argument("--repeats", type=int, default=2, help="runs of a process")
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each variant, in alternation"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--surrogate-repeats", type=int, default=300, help="runs of each surrogate")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/selection"), help="folder of the tables"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell))))
        return
    shared = {
        "T": options.tokens,
        "share": options.share,
        "threads": options.threads,
        "repeats": options.repeats,
    }
    cells: list[Cell] = []
    for _ in range(options.rounds):
        for V in options.vocabularies:
            for D in options.widths:
                for variant in VARIANTS:
                    cell = spawn(shared | {"variant": variant, "V": V, "D": D})
                    if cell is not None:
                        cells.append(cell)
                        print(json.dumps(cell), file=sys.stderr, flush=True)
    rows, surrogates = compare(cells), measure_surrogates(options.surrogate_repeats)
    text = "\n".join([table(rows), "", table(surrogates), "", *verdicts(rows, surrogates)])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "selection.md").write_text(text + "\n")
    write(options.out / "selection.csv", rows)
    write(options.out / "surrogates.csv", surrogates)
    print(text)


if __name__ == "__main__":
    main()
