"""Spread of differences between two ELBOs: with the same noise, and with independent noise.

    python benchmarks/masked/elbo_variance.py --out docs

A small masked policy learns texts of period four, in which a fifth of the letters is random. So it
never becomes sure of its texts. Its ELBO is then compared with that of the same policy a few steps
later, as a ratio would. Each estimate is made many times with the same number of
passes: by single masks (`Elbo`), and by pairs of a mask and its complement (`CoupledElbo`). The
spread is the standard deviation over draws in nats, as root mean square over rows.

The script writes `elbo_variance.csv` and `elbo_variance.png` in about three minutes on one idle thread.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from lightning_mpo.objective.likelihoods import CoupledElbo, Elbo, Likelihood
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.types import Finish, Rollout, take_rows

PERIOD, PROMPT, CANVAS, FIRST_LETTER = 4, 4, 32, 3
PASSES = (2, 4, 8, 16)
Row = dict[str, float | str]


def texts(rows: int, letters: int, share: float, generator: torch.Generator) -> Rollout:
    """Return texts of period four as responses; each follows a prompt of one period.

    Args:
        rows: number of texts.
        letters: number of letters.
        share: probability that a letter of the response is random.
        generator: source of all randomness.
    """
    period_BN = torch.randint(letters, (rows, PERIOD), generator=generator) + FIRST_LETTER
    tokens_BL = period_BN.repeat(1, (PROMPT + CANVAS) // PERIOD)
    responses_BT = tokens_BL[:, PROMPT:]
    others_BT = torch.randint(letters, responses_BT.shape, generator=generator) + FIRST_LETTER
    random_BT = torch.rand(responses_BT.shape, generator=generator) < share
    responses_BT.copy_(torch.where(random_BT, others_BT, responses_BT))
    mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    return Rollout(
        tokens_BL=tokens_BL,
        attention_mask_BL=mask_BL,
        response_mask_BT=mask_BL[:, PROMPT:],
        group_B=torch.arange(rows),
        behaviour_logprobs_BT=torch.zeros(rows, CANVAS),
        finish_B=torch.full((rows,), int(Finish.LENGTH)),
    )


def noised(rollout: Rollout, likelihood: Likelihood, generator: torch.Generator) -> Rollout:
    """Return the rows with the noise of one draw; a response has `repeats` rows."""
    noise = likelihood.draw(rollout, generator)
    rows = torch.arange(len(rollout.group_B)).repeat_interleave(likelihood.repeats)
    made = vars(take_rows(rollout, rows))
    return Rollout(**made | {"hidden_BCL": noise.hidden_BCL, "copy_weights_BCT": noise.weights_BCT})


def train(policy: TinyMaskedPolicy, steps: int, share: float, generator: torch.Generator) -> None:
    """Raise the ELBO of random texts, one mask for each."""
    letters = policy.vocabulary - FIRST_LETTER
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = noised(texts(64, letters, share, generator), Elbo(samples=1), generator)
        scores = policy.score(rows, rows.response_mask_BT, temperature=1.0)
        optimizer.zero_grad()
        (-scores.logprobs_BT.sum() / rows.response_mask_BT.sum()).backward()
        optimizer.step()


def elbos(policy: TinyMaskedPolicy, rows: Rollout, repeats: int) -> Tensor:
    """Return the estimate of each response: the sum over tokens, and its mean over rows."""
    logprobs_BT = Scorer(policy, tokens=65_536).score(rows).logprobs_BT
    return logprobs_BT.double().sum(1).view(-1, repeats).mean(1)


def spread(values_DB: Tensor) -> float:
    """Return the standard deviation over draws, its root mean square over responses."""
    return float(values_DB.var(0).mean().sqrt())


def measure(
    policies: tuple[TinyMaskedPolicy, TinyMaskedPolicy],
    rollout: Rollout,
    likelihood: Likelihood,
    draws: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Return the spread of the ELBO, and of its difference between two policies.

    Args:
        policies: the old and the new one.
        rollout: responses.
        likelihood: draws the noise.
        draws: number of draws.
        generator: source of all randomness.
    """
    old, new = policies
    values: dict[str, list[Tensor]] = {"ELBO": [], "same noise": [], "independent noise": []}
    for _ in range(draws):
        first, second = (noised(rollout, likelihood, generator) for _ in range(2))
        before_B = elbos(old, first, likelihood.repeats)
        values["ELBO"].append(before_B)
        values["same noise"].append(elbos(new, first, likelihood.repeats) - before_B)
        values["independent noise"].append(elbos(new, second, likelihood.repeats) - before_B)
    return {name: spread(torch.stack(parts)) for name, parts in values.items()}


def compare(steps: int, later: int, share: float, rows: int, draws: int, seed: int) -> list[Row]:
    """Train a policy, and measure both estimators with each number of passes.

    Args:
        steps: of training.
        later: steps from the old policy to the new one.
        share: of random letters in the texts.
        rows: responses.
        draws: of noise, for each response.
        seed: of everything.
    """
    # two policies
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    old = TinyMaskedPolicy(hidden_size=64, layers=2, heads=4, max_length=PROMPT + CANVAS)
    old.build(device=torch.device("cpu"), reference=False)
    train(old, steps, share, generator)
    new = deepcopy(old)
    train(new, later, share, generator)
    # estimates with equal numbers of passes
    rollout = texts(rows, old.vocabulary - FIRST_LETTER, share, generator)
    table: list[Row] = []
    for passes in PASSES:
        members = {
            "single masks": Elbo(passes, stratified=False),
            "pairs": CoupledElbo(passes // 2),
        }
        for name, likelihood in members.items():
            measured = measure((old, new), rollout, likelihood, draws, generator)
            table.append({"estimator": name, "passes": passes, **measured})
    return table


def draw(table: Sequence[Row], path: Path) -> None:
    """Draw the spread of differences against the number of passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for estimator, colour in (("single masks", "tab:blue"), ("pairs", "tab:orange")):
        rows = [row for row in table if row["estimator"] == estimator]
        for noise, style in (("same noise", "-o"), ("independent noise", "--s")):
            axes.plot(
                [float(row["passes"]) for row in rows],
                [float(row[noise]) for row in rows],
                style,
                color=colour,
                label=f"{estimator}, {noise}",
            )
    axes.set(xscale="log", yscale="log", xlabel="passes for an estimate")
    axes.set_ylabel("standard deviation of\nELBO differences, nats")
    axes.set_xticks(PASSES, [str(passes) for passes in PASSES])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write the table and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="runs/masked", help="folder of table and picture")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--later", type=int, default=5, help="steps between the policies")
    parser.add_argument("--random", type=float, default=0.2, help="share of random letters")
    parser.add_argument("--rows", type=int, default=16, help="responses")
    parser.add_argument("--draws", type=int, default=100, help="of noise")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = compare(
        options.steps, options.later, options.random, options.rows, options.draws, options.seed
    )
    # table and picture
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "elbo_variance.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    draw(table, folder / "elbo_variance.png")
    for row in table:
        numbers = (f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
        print(f"{row['estimator']:12s} {row['passes']:3d} passes: {', '.join(numbers)}")


if __name__ == "__main__":
    main()
