"""Shared code of the analyses of MPO: policy, frozen rollouts, matched clips, tables, pictures."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mpo.data.arithmetic import Arithmetic
from lightning_mpo.errors import UserError
from lightning_mpo.functional.diagnostics import clip_distance, matching_clip
from lightning_mpo.objective.action_spaces import Actions, ActionSpace
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import BlockWeights
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.policies import MedusaHeads, MTPHeads, ParallelHeads, SequentialHeads, TinyPolicy
from lightning_mpo.rollout import load_rollout
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = "0123456789+=,;"  # of the quickstart, as are the attention heads and the data
ATTENTION_HEADS = 4
FAMILIES: dict[str, type[MTPHeads]] = {
    kind.family: kind for kind in (ParallelHeads, SequentialHeads, MedusaHeads)
}

Row = Mapping[str, Any]

# --- command line -------------------------------------------------------------------------------------------------


def parser(doc: str, *, frozen: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options of every analysis."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    if frozen:
        made.add_argument(
            "--frozen", default="runs/frozen.safetensors", help="what freeze.py wrote"
        )
    made.add_argument(
        "--out", default="runs/mpo_analyses", help="folder of the table and the picture"
    )
    add_threads(made)
    return made


def add_threads(made: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    made.add_argument("--threads", type=at_least(1), default=1, help="threads of torch")


def at_least(low: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Return the type of an option that is a number no smaller than `low`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def share(text: str) -> float:
    """Read a share of future tokens: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; a user's mistake is one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


# --- policy -------------------------------------------------------------------------------------------------------


def load_policy(checkpoint: str | Path) -> TinyPolicy:
    """Return the quickstart's policy with the weights of a checkpoint; sizes and heads are those of the checkpoint."""
    content = _read(checkpoint)
    weights, heads = content["state_dict"], content.get("mtp")
    prefix = "policy.network.model."
    try:
        hidden_size = weights[f"{prefix}embed_tokens.weight"].shape[1]
        intermediate_size = weights[f"{prefix}layers.0.mlp.gate_proj.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"{str(checkpoint)!r} is no checkpoint of the quickstart's policy: no {error}"
        ) from error
    mtp = None
    if heads is not None:
        mtp = FAMILIES[heads["family"]](
            offsets=heads["offsets"], own_unembedding=heads["own_unembedding"]
        )
    policy = TinyPolicy(
        CHARACTERS,
        hidden_size=hidden_size,
        layers=len({name.split(".")[4] for name in weights if name.startswith(f"{prefix}layers.")}),
        heads=ATTENTION_HEADS,
        intermediate_size=intermediate_size,
        mtp=mtp,
        checkpoint=str(checkpoint),
    )
    policy.check()
    policy.build(device=torch.device("cpu"), reference=False)
    return policy


def _read(checkpoint: str | Path) -> dict[str, Any]:
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        _ = content["state_dict"]
    except Exception as error:
        raise UserError(
            f"{str(checkpoint)!r} cannot be read as a checkpoint: {type(error).__name__}"
        ) from error
    return content


def offsets_of(policy: TinyPolicy) -> int:
    """Return M, 0 without heads."""
    return 0 if policy.mtp is None else policy.mtp.offsets


def sample(
    policy: TinyPolicy,
    prompts: int,
    completions: int,
    *,
    held_out: bool,
    max_new_tokens: int,
    seed: int,
) -> Rollout:
    """Sample from the untruncated softmax at temperature 1, a group's rows side by side."""
    data = Arithmetic(digits=3, careless_share=0.55, seed=seed)
    data.connect(policy.tokenizer)
    rows: Sequence[PromptRow] = (
        data.splits.validation[:prompts] if held_out else data.training_rows(0, prompts)
    )
    if len(rows) < prompts:
        raise UserError(f"there are {len(rows)} held-out problems, {prompts} were asked for")
    return LocalSampler(batch_size=512).sample(
        policy,
        data.encode(rows),
        completions,
        SamplingRequest(FullVocabulary(), 1.0, max_new_tokens),
        generator=generator_of(seed, Stream.CHECK),
    )


# --- frozen rollouts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """A rollout, its advantages, and its log-probs before and after a few updates."""

    rollout: Rollout
    advantages_BT: Tensor
    old_logprobs_BT: Tensor
    logprobs_BT: Tensor
    old_future_BTM: Tensor | None = None
    future_BTM: Tensor | None = None

    @classmethod
    def load(cls, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Frozen:
        """Read a file of freeze.py; with a tokenizer, refuse one of another."""
        rollout, tensors = load_rollout(path, tokenizer)
        for name in ("advantages_BT", "old_logprobs_BT", "logprobs_BT"):
            if name not in tensors:
                raise UserError(
                    f"{str(path)!r} is a rollout without {name}; make it with benchmarks/mpo/freeze.py"
                )
        return cls(
            rollout, **{name: tensors[name] for name in cls.__dataclass_fields__ if name in tensors}
        )

    @property
    def mask_BT(self) -> Tensor:
        """Response tokens."""
        return self.rollout.response_mask_BT

    @property
    def offsets(self) -> int:
        """M, the offsets that heads have scored; 0 without heads."""
        return 0 if self.future_BTM is None else self.future_BTM.shape[2]

    def log_ratios(self, future: int = 0) -> Tensor:
        """Return log(π / π_old) of the tokens, `[B, T]`, or with `future` offsets of the heads, `[B, T, 1 + future]`."""
        own_BT = torch.where(self.mask_BT, self.logprobs_BT - self.old_logprobs_BT, 0.0)
        if not future:
            return own_BT
        if self.future_BTM is None or self.old_future_BTM is None or self.offsets < future:
            raise UserError(
                f"the frozen rollout has {self.offsets} offsets of multi-token heads, {future} are needed"
            )
        ahead = (self.future_BTM - self.old_future_BTM)[..., :future]
        return torch.cat([own_BT[..., None], torch.where(self.mask_BT[..., None], ahead, 0.0)], -1)

    def actions(self, space: ActionSpace) -> Actions:
        """Group the tokens as an action space does."""
        return space.actions(self.log_ratios(space.future), self.advantages_BT, self.mask_BT)

    def clip_fraction(self, space: ActionSpace, epsilon: float) -> float:
        """Return the share of actions whose gradient `ClippedRatio(epsilon, epsilon)` stops."""
        actions = self.actions(space)
        return float(ClippedRatio(epsilon, epsilon).clipped(actions).sum() / actions.mask_BU.sum())

    def matching_clip(self, space: ActionSpace, fraction: float) -> float:
        """Return the ε at which that share is `fraction`, NaN if there is none."""
        actions = self.actions(space)
        distances_BU = clip_distance(actions.log_ratios_BU, actions.advantages_BU)
        return matching_clip(distances_BU, actions.mask_BU, fraction)


def blocks(
    length: int, weights: BlockWeights | None, source: str, *, joint: bool = False
) -> BlockActions:
    """Return sliding blocks; None: all weights 1."""
    return BlockActions(weights, length, source=source, ratio="joint" if joint else "weighted")  # type: ignore[arg-type]


def spread(weights_N: Sequence[float]) -> float:
    """Return `sqrt(Σ β²)`, what a weighted mean of independent log-ratios keeps of their standard deviation."""
    return math.sqrt(sum(weight**2 for weight in weights_N))


# --- results ------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], folder: str | Path, name: str) -> None:
    """Print a table as Markdown and write it as CSV."""
    print_table(rows)
    write_csv(rows, folder, name)


def print_table(rows: Sequence[Row]) -> None:
    """Print a table as Markdown."""
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row[column]) for column in columns) + " |")


def write_csv(rows: Sequence[Row], folder: str | Path, name: str) -> None:
    """Write a table as CSV."""
    path = Path(folder) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwrote {path}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def panels(
    rows: int, columns: int, width: float, height: float = 3.6, *, share_rows: bool = False
) -> tuple[Any, Any]:
    """Return a figure and its axes `[rows, columns]`, in the style of the project's pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
        sharey="row" if share_rows else "none",
    )
    for one in axes.flat:
        one.grid(alpha=0.3)
    return figure, axes


def save_picture(figure: Any, folder: str | Path, name: str) -> None:
    """Write a figure as PNG."""
    from matplotlib import pyplot

    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"wrote {path}")
