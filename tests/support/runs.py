"""Tiny runs of the whole training loop, and what they logged: shared by the tests of modules and callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.data.arithmetic import Arithmetic
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.action_spaces import ActionSpace, TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rollout import join_rollouts
from lightning_mpo.sampling import LocalSampler
from lightning_mpo.types import PromptBatch

CHARACTERS = "0123456789+-*=;, "
CLOCKS = ("throughput/", "time/")
"""Metrics that two equal runs do not share."""


class Digits(Reward):
    """The share of a response's characters that are digits below 5: graded, so that groups differ."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [
            sum(c in "01234" for c in done.text) / max(len(done.text), 1) for done in completions
        ]


class Record(Logger):
    """Keeps what is logged, by the step it was logged at."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "record"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append(
            (
                int(step or 0),
                {name: float(value) for name, value in metrics.items() if name != "epoch"},
            )
        )

    def without_clocks(self) -> list[tuple[int, dict[str, float]]]:
        """Return the lines that a run repeats exactly."""
        return [
            (step, {name: value for name, value in line.items() if not name.startswith(CLOCKS)})
            for step, line in self.lines
        ]

    def column(self, name: str) -> list[float]:
        return [line[name] for _, line in self.lines if name in line]


class ByPrompt(LocalSampler):
    """Draws each prompt's completions from a generator of its own, so that they are the same on every rank."""

    def sample(self, policy, prompts, completions, request, *, generator, **options):
        parts = []
        for p in range(len(prompts)):
            one = PromptBatch(
                prompts.input_ids_PS[p : p + 1],
                prompts.attention_mask_PS[p : p + 1],
                prompts.rows[p : p + 1],
            )
            seed = torch.Generator().manual_seed(
                int(one.input_ids_PS.sum() * 1000 + one.input_ids_PS[0, 0])
            )
            parts.append(
                super().sample(policy, one, completions, request, generator=seed, **options)
            )
        return join_rollouts(parts)


class Probe(L.Callback):
    """Calls a function at the end of each slot; put it where the trainer takes callbacks."""

    def __init__(self, **hooks: Any) -> None:
        for name, hook in hooks.items():
            setattr(self, name, hook)


@dataclass
class Run:
    trainer: L.Trainer
    module: PolicyOptimization
    rollout: RolloutLoop
    record: Record
    weights: dict[str, Tensor] = field(default_factory=dict)


def make_policy(kind: type[Any] = TinyPolicy, **options: Any) -> Any:
    """Return an unbuilt policy of two layers whose weights are the same in every run, sharp enough to matter."""
    policy = kind(
        **({"characters": CHARACTERS, "hidden_size": 32, "layers": 2, "heads": 2} | options)
    )
    load = policy.load_network

    def load_seeded() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = load()
        with torch.no_grad():
            for weight in network.parameters():
                if weight.ndim == 2:
                    weight.mul_(4.0)
        return network

    policy.load_network = load_seeded
    return policy


def make_objective(**axes: Any) -> Objective:
    actions: ActionSpace = axes.pop("actions", None) or TokenActions()
    return Objective(
        **{
            "support": FullVocabulary(),
            "actions": actions,
            "advantage": GroupRelative(),
            "surrogate": ClippedRatio(),
            "selection": AllTokens(),
            "reduction": TokenMean(),
        }
        | axes
    )


def make_data(**options: Any) -> Arithmetic:
    """Return 12 training problems, so that 4 prompts a rollout give 3 rollouts an epoch, and 4 held-out ones."""
    return Arithmetic(**({"digits": 1, "train_problems": 12, "held_out_problems": 4} | options))


def sgd(lr: float = 0.05) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adam(lr: float = 1e-3) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def make_trainer(folder: Path, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(
                "Checkpoint" in type(callback).__name__ for callback in callbacks
            ),
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(folder),
            "callbacks": list(callbacks),
        }
        | options
    )


def fit(
    folder: Path,
    *,
    rollout: dict[str, Any] | None = None,
    objective: Objective | None = None,
    callbacks: Sequence[L.Callback] = (),
    policy: Any = None,
    data: Any = None,
    module: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    first: bool = False,
    **trainer: Any,
) -> Run:
    """Train and return what happened. The rollout callback stands last in the list, where the command line puts it.

    Args:
        folder: the run folder.
        rollout: arguments of `RolloutLoop`; by default 4 prompts x 4 completions of up to 8 tokens.
        objective: the algorithm; by default clipped ratios of tokens.
        callbacks: besides `RolloutLoop`.
        policy: unbuilt.
        data: the data module.
        module: arguments of `PolicyOptimization`.
        ckpt_path: what to resume.
        first: put the rollout callback first.
        trainer: arguments of the trainer.
    """
    options = {
        "rewards": [Digits()],
        "prompts": 4,
        "completions": 4,
        "max_new_tokens": 8,
        "seed": 1,
    } | (rollout or {})
    source, record = RolloutLoop(**options), Record()
    model = PolicyOptimization(
        policy or make_policy(),
        objective or make_objective(),
        **({"optimizer": adam()} | (module or {})),
    )
    ordered = [source, *callbacks] if first else [*callbacks, source]
    machine = make_trainer(folder, ordered, **({"logger": record, "max_steps": 4} | trainer))
    machine.fit(model, datamodule=data or make_data(), ckpt_path=ckpt_path)
    weights = {name: weight.detach().clone() for name, weight in model.policy.named_parameters()}
    return Run(machine, model, source, record, weights)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two sets of weights over the norm of the second."""
    off = torch.stack([(first[name] - second[name]).norm() for name in second]).norm()
    return (off / torch.stack([weight.norm() for weight in second.values()]).norm()).item()
