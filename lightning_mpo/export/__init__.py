"""Exports a policy to a folder that others can load, loads it again, and compares both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_mpo.export import card, folder, forms, verify
from lightning_mpo.export.folder import Sampling, check_target, part_of
from lightning_mpo.export.forms import check_form
from lightning_mpo.export.origin import Origin
from lightning_mpo.export.usage import usage_of
from lightning_mpo.export.verify import Check
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.quiet import no_loading_bars
from lightning_mpo.types import PromptBatch

__all__ = ["Check", "Origin", "Sampling", "check_form", "check_target", "export", "part_of"]

Form = Literal["adapter", "merged", "full"]
Dtype = Literal["bfloat16", "float32"]


@no_loading_bars()
def export(
    policy: LoadedPolicy,
    to: Path,
    form: Form,
    prompts: PromptBatch,
    *,
    dtype: Dtype = "bfloat16",
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    origin: Origin = Origin(),  # noqa: B008  frozen
    data: Any = None,
) -> tuple[Check, tuple[str, ...]]:
    """Write a policy to a temporary folder, load it again as a user would, and compare.

    If the comparison passes, the folder is renamed to `to`; else it stays at `part_of(to)`. Call
    `check_target` before a policy is loaded or trained.

    Args:
        policy: a built one; it comes back as it was.
        to: the folder; files of an earlier export are replaced, and nothing else.
        form: `adapter` for peft; `merged`, adapters added to the unquantised base; `full`, all
            weights.
        prompts: prompts for the comparison.
        dtype: of merged weights.
        sampling: as in training.
        origin: the run, for the model card.
        data: the run's data module, whose options `predict --model` needs again.

    Returns:
        the comparison, without `problems` if the folder holds the policy, and notes for the user.
    """
    temperature = sampling.temperature
    observed = _observe(policy, prompts, sampling)
    # write weights, tokenizer, options and usage beside the target
    part = folder.begin(to)
    expected = _write_weights(policy, part, form, dtype, observed, prompts, sampling)
    folder.write_extras(policy, part, sampling)
    seed = (origin.config or {}).get("seed_everything")
    stored = dtype if form == "merged" else str(policy.dtype).removeprefix("torch.")
    usage = usage_of(policy, form, sampling, data, seed, stored)
    usage.write(part)
    # load them again and compare
    reloaded = forms.reload(policy, part, form)
    quantised = policy.quantization is not None
    # 4-bit layers compute in bfloat16
    rounded = dtype == "bfloat16" if form == "merged" else quantised
    check = verify.compare(expected, reloaded, temperature, rounded=rounded)
    others = [verify.check_heads(policy, part), _tokenizer(policy, reloaded.tokenizer, prompts)]
    check = replace(check, problems=(*check.problems, *(text for text in others if text)))
    notes: tuple[str, ...] = ()
    if form == "merged":
        drift = None
        if quantised:
            drift = verify.compare(observed, reloaded, temperature, rounded=True)
        notes = (_merging(check, drift, dtype),)
    # describe the folder, and rename it if it holds the policy
    name = to.resolve().name
    card.write_card(part, card.Exported(policy, name, form, sampling, origin, check, notes))
    if not check.problems:
        folder.finish(to)
    return check, notes


def _observe(policy: LoadedPolicy, prompts: PromptBatch, sampling: Sampling) -> verify.Observed:
    """Observe a policy; a canvas may be as long as the model has positions for."""
    tokens = min(24, sampling.max_new_tokens) if policy.masked else 24
    return verify.observe(policy, prompts, sampling.temperature, tokens, sampling.sampler)


def _write_weights(
    policy: LoadedPolicy,
    part: Path,
    form: Form,
    dtype: Dtype,
    observed: verify.Observed,
    prompts: PromptBatch,
    sampling: Sampling,
) -> verify.Observed:
    """Write the weights of a form; return the observations that the reloaded model must repeat."""
    if form == "adapter":
        forms.write_adapter(policy, part)
        return observed
    if form == "full":
        forms.write_full(policy, part)
        return observed
    # a merge into an unquantised base is compared with adapters on that base
    twin = forms.unquantised(policy)
    if policy.quantization is not None:
        observed = _observe(twin, prompts, sampling)
    forms.write_merged(twin, part, getattr(torch, dtype))
    return observed


def _merging(check: Check, drift: Check | None, dtype: Dtype) -> str:
    """Return a note on the accuracy of a merge.

    Args:
        check: the comparison with the adapters on the unquantised base.
        drift: the comparison with the policy itself, if its base was quantised.
        dtype: of the merged weights.
    """
    note = "merged weights are the unquantised base plus the adapters"
    if dtype == "bfloat16":
        note += ", rounded to bfloat16, in which changes below about 1/256 of a weight are lost"
        if check.recovered is not None:
            note += f": {check.recovered:.0%} of what training changed in log-probs is there"
        note += " (--dtype float32 keeps all; the adapter form is exact)"
    if drift is not None:
        note += (
            "; the policy was trained on a 4-bit base, from which they differ by "
            f"{drift.mean:.2g} nats per token on average and {drift.largest:.2g} at most: evaluate "
            "them before use, or take the adapter form on that base"
        )
    return note


def _tokenizer(policy: LoadedPolicy, tokenizer: Any, prompts: PromptBatch) -> str | None:
    """Return the first fault of a reloaded tokenizer, or None."""
    original = policy.tokenizer
    if original.chat_template != tokenizer.chat_template:
        return "the chat template is not the policy's"
    for row in prompts.rows:
        if original(row.prompt)["input_ids"] != tokenizer(row.prompt)["input_ids"]:
            return f"the tokenizer reads the prompt {row.prompt[:40]!r} otherwise"
    return None
