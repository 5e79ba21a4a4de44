"""The model card of an exported folder: the facts for `card.md.jinja`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import lightning_mpo
from lightning_mpo.export.folder import CARD, Sampling
from lightning_mpo.export.option_text import option_text
from lightning_mpo.export.origin import Origin, find_method
from lightning_mpo.export.verify import Check
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies.checkpoints import HEADS
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.policies.pretrained import is_from_wheels
from lightning_mpo.recipes.headers import Method
from lightning_mpo.recipes.tree import value_at
from lightning_mpo.rollout.evaluation import readable
from lightning_mpo.sampling.diffusion import DiffusionSampler

TEMPLATE = Path(__file__).with_name("card.md.jinja")
MEASURES = ("pass_at_1", "greedy_accuracy", "support_pass_at_1", "length", "truncated", "kl")
"""Measures of a run's summary that the table of results may hold."""
RELATIONS = {"adapter": "adapter", "merged": "merge", "full": "finetune"}
"""The hub's word for the relation to a base, by form."""


@dataclass(frozen=True)
class Exported:
    """A policy in a folder, as its card describes it.

    Args:
        policy: the exported policy.
        name: name of the folder.
        form: `adapter`, `merged` or `full`.
        sampling: as in training.
        origin: the run.
        check: distance of the reloaded model from the policy.
        notes: warnings for the user, such as on merging.
    """

    policy: LoadedPolicy
    name: str
    form: str
    sampling: Sampling
    origin: Origin
    check: Check
    notes: tuple[str, ...]


def write_card(folder: Path, exported: Exported) -> None:
    """Write `README.md` with its metadata into a folder."""
    origin = exported.origin
    closest = find_method(origin.objective) if origin.objective else None
    method = None if closest is None else _method(*closest)
    card: ModelCard = ModelCard.from_template(
        _metadata(exported, method),
        template_path=str(TEMPLATE),
        check=exported.check,
        form=exported.form,
        method=method,
        name=exported.name,
        notes=exported.notes,
        version=lightning_mpo.__version__,
        **_policy(exported.policy),
        **_sampling(exported.sampling, exported.policy),
        **_training(origin),
        **_results(origin.summary),
    )
    card.save(folder / CARD)


def base_name(policy: LoadedPolicy) -> str | None:
    """Return the name of the base: a hub id, a wheel, or the last part of a path; None: no base."""
    if policy.source == "tiny":
        return None
    path = Path(policy.source)
    return path.name if path.expanduser().is_dir() else policy.source


def _metadata(exported: Exported, method: dict[str, Any] | None) -> ModelCardData:
    tags = ["lightning-mpo", "reinforcement-learning", *([method["name"]] if method else [])]
    base = base_name(exported.policy)
    relation: dict[str, Any] = (
        {} if base is None else {"base_model_relation": RELATIONS[exported.form]}
    )
    return ModelCardData(
        base_model=base,
        library_name="peft" if exported.form == "adapter" else "transformers",
        pipeline_tag="fill-mask" if _of_masked_class(exported.policy) else "text-generation",
        tags=tags,
        **relation,
    )


def _of_masked_class(policy: LoadedPolicy) -> bool:
    """Return whether the class of the model is one for masked tokens, and no causal one."""
    return policy.masked and policy.kind.masked_family(policy.config)


def _policy(policy: LoadedPolicy) -> dict[str, Any]:
    lora = policy.lora
    targets = None if lora is None else option_text(lora.targets)
    return {
        "auto_class": policy.kind.auto_class(policy.config).__name__,
        "base": base_name(policy),
        "base_from_wheel": is_from_wheels(policy.source),
        "critic": policy.critic is not None,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "heads": None if policy.mtp is None else policy.mtp.offsets,
        "heads_file": HEADS,
        "lora": lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": targets},
        "quantised": policy.quantization is not None,
    }


def _sampling(sampling: Sampling, policy: LoadedPolicy) -> dict[str, Any]:
    sampler, complete = sampling.sampler, sampling.is_complete
    if isinstance(policy, MaskedPolicy):
        support = sampling.support
        complete = support is None or (
            isinstance(support, FullVocabulary) and not support.fixed.bars
        )
    facts = {
        "temperature": f"{sampling.temperature:g}",
        "max_new_tokens": sampling.max_new_tokens,
        "stop": [json.dumps(token, ensure_ascii=False) for token in sampling.stop],
        "unsaid_support": None if complete else type(sampling.support).__name__,
        "masked": None,
    }
    if not isinstance(policy, MaskedPolicy):
        return facts
    steps = "its blocks and steps are not known"
    if isinstance(sampler, DiffusionSampler):
        steps = (
            f"blocks of {sampler.block} from the left, tokens a step {sampler.tokens_per_step}, "
            f"remasking {sampler.remasking}"
        )
    mask = policy.tokenizer.convert_ids_to_tokens(policy.mask_id)
    masked = {"mask": mask, "shift": policy.shift, "steps": steps}
    return facts | {"masked": masked | {"causal_class": not _of_masked_class(policy)}}


def _method(method: Method, differences: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "name": method.path.stem,
        "summary": method.header[""].split(". ")[0].rstrip("."),
        "paper": method.header["paper"],
        "differences": [
            f"{key} = {option_text(value)} (file: {option_text(in_file)})"
            for key, (value, in_file) in sorted(differences.items())
        ],
    }


def _training(origin: Origin) -> dict[str, Any]:
    config = origin.config or {}
    rollout = config.get("rollout") or {}
    rewards = rollout.get("rewards") if "rewards" in rollout else None
    arguments = value_at(config, "model", "init_args") or {}
    checkpoint = value_at(arguments, "policy", "init_args", "checkpoint")
    axes = {
        axis: value for axis, value in (origin.objective or {}).items() if value not in (None, [])
    }
    optimizer = arguments.get("optimizer")
    return {
        "begun_from": checkpoint and "/".join(Path(checkpoint).parts[-2:]),
        "completions": rollout.get("completions"),
        "configured": origin.config is not None,
        "data": option_text(config["data"]) if config.get("data") else None,
        "objective": [f"{axis} `{option_text(value)}`" for axis, value in axes.items()],
        "optimiser": option_text(optimizer) if optimizer else None,
        "prompts": rollout.get("prompts"),
        "rewards": rewards and [f"`{option_text(reward)}`" for reward in rewards],
        "rollouts": "an unknown number" if origin.rollouts is None else origin.rollouts,
        "updates": "an unknown number" if origin.updates is None else origin.updates,
        **({"seed": config["seed_everything"]} if "seed_everything" in config else {}),
    }


def _results(summary: dict[str, Any] | None) -> dict[str, Any]:
    """Return the table of results, a row per measure and a column per evaluation of the run."""
    stages = {
        name: stage
        for name, stage in (summary or {}).items()
        if isinstance(stage, dict) and "pass_at_1" in stage
    }
    facts = {"evaluated": summary is not None, "problems": (summary or {}).get("problems")}
    if not stages:
        return facts | {"results": None}
    rows = [["", *stages], ["---"] * (len(stages) + 1)]
    for measure in MEASURES:
        if any(measure in stage for stage in stages.values()):
            cells = (_cell(stage, measure) for stage in stages.values())
            rows.append([readable(measure), *cells])
    return facts | {"results": rows}


def _cell(stage: dict[str, Any], measure: str) -> str:
    value, bounds = stage.get(measure), stage.get(f"{measure}_interval")
    if value is None:
        return ""
    return f"{value:.3g}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
