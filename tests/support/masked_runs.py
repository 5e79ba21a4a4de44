"""Objectives, configurations and small runs of masked policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.likelihoods import Likelihood
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import SequenceMean
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.sampling import DiffusionSampler
from tests.support.configurations import BASE
from tests.support.runs import Digits, adam, make_data, make_objective, make_trainer


def masked_objective(likelihood: Likelihood) -> Objective:
    """Return clipped ratios of whole responses, or of tokens if the likelihood has them."""
    axes: dict[str, Any] = {}
    if not likelihood.token_level:
        axes = {"actions": SequenceActions(), "reduction": SequenceMean()}
    return make_objective(likelihood=likelihood, **axes)


def planned(folder: Path, likelihood: Likelihood, accumulate: int = 1) -> tuple[Any, Any, Any]:
    """Return module, data and trainer of 4 prompts x 4 completions on a canvas of 8 tokens."""
    loop = RolloutLoop(
        [Digits()],
        prompts=4,
        completions=4,
        max_new_tokens=8,
        sampler=DiffusionSampler(block=4, tokens_per_step=2),
    )
    module = PolicyOptimization(
        TinyMaskedPolicy(hidden_size=32, layers=2, heads=2),
        masked_objective(likelihood),
        optimizer=adam(),
    )
    trainer = make_trainer(folder, [loop], accumulate_grad_batches=accumulate)
    return module, make_data(), trainer


def masked_configuration(**callbacks: dict[str, Any]) -> str:
    """Return the configuration of a small run of AGRPO, as YAML; callbacks with their options."""
    base = yaml.safe_load(BASE)
    arguments = base["model"]["init_args"]
    arguments["policy"]["class_path"] = "TinyMaskedPolicy"
    arguments["objective"] |= {"likelihood": {"class_path": "Denoising", "init_args": {"steps": 2}}}
    sampler = {"class_path": "DiffusionSampler", "init_args": {"block": 4, "tokens_per_step": 2}}
    base["rollout"] |= {
        "rewards": ["Finished"],
        "completions": 4,
        "max_new_tokens": 8,
        "sampler": sampler,
    }
    base["trainer"] |= {"max_steps": 2, "log_every_n_steps": 1}
    base["trainer"]["callbacks"] += [
        {"class_path": name, "init_args": options} for name, options in callbacks.items()
    ]
    return yaml.safe_dump(base)
