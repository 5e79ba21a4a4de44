"""From a policy to a folder that others can load, which is loaded again and compared before it is called done."""

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
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.quiet import no_loading_bars
from lightning_mpo.types import PromptBatch

__all__ = ["Check", "Origin", "Sampling", "check_form", "check_target", "export", "part_of"]

Form = Literal["adapter", "merged", "full"]
Dtype = Literal["bfloat16", "float32"]


@no_loading_bars()
def export(
    policy: CausalPolicy,
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

    If the comparison passes, the folder is renamed to `to`; else it stays at `part_of(to)`. Call `check_target` before a
    policy is loaded or trained.

    Args:
        policy: a built one; it comes back as it was.
        to: the folder; what an earlier export wrote there is replaced, and nothing else.
        form: `adapter` for peft; `merged`, adapters added to the unquantised base; `full`, all weights.
        prompts: prompts for the comparison.
        dtype: of merged weights.
        sampling: as in training.
        origin: the run, for the model card.
        data: the run's data module, whose options `predict --model` needs again.

    Returns:
        the comparison, whose `problems` are empty if the folder holds the policy, and notes for the user.
    """
    from transformers import GenerationConfig

    seen, notes = verify.observe(policy, prompts, sampling.temperature), []
    part = folder.begin(to)
    if form == "merged":
        twin = forms.unquantised(policy)
        expected = (
            verify.observe(twin, prompts, sampling.temperature)
            if forms.is_quantised(policy)
            else seen
        )
        forms.write_merged(twin, part, getattr(torch, dtype))
        del twin
    else:
        expected = seen
        forms.write_adapter(policy, part) if form == "adapter" else forms.write_full(policy, part)
    folder.write_extras(policy, part, sampling)
    seed = (origin.config or {}).get("seed_everything")
    of_base = str(policy.dtype).removeprefix("torch.")
    stored = dtype if form == "merged" else of_base
    usage_of(policy, form, sampling.temperature, sampling.max_new_tokens, data, seed, stored).write(
        part
    )
    network, tokenizer = forms.reload(policy, part, form)
    # 4-bit layers compute in bfloat16
    rounded = dtype == "bfloat16" if form == "merged" else forms.is_quantised(policy)
    again = GenerationConfig.from_pretrained(part)
    check = verify.compare(
        expected, network, tokenizer, again, sampling.temperature, rounded=rounded
    )
    if form == "merged":
        drift = None
        if forms.is_quantised(policy):
            drift = verify.compare(
                seen, network, tokenizer, again, sampling.temperature, rounded=True
            )
        notes.append(_merging(check, drift, dtype))
    problems = [verify.check_heads(policy, part), _tokenizer(policy, tokenizer, prompts)]
    check = replace(
        check, problems=(*check.problems, *(problem for problem in problems if problem))
    )
    card.write_card(policy, part, to, form, sampling, origin, check, tuple(notes))
    if not check.problems:
        folder.finish(to)
    return check, tuple(notes)


def _merging(check: Check, drift: Check | None, dtype: Dtype) -> str:
    """Say what merging means."""
    said = "merged weights are the unquantised base plus the adapters"
    if dtype == "bfloat16":
        said += ", rounded to bfloat16, in which changes below about 1/256 of a weight are lost"
        if check.kept is not None:
            said += f": {check.kept:.0%} of what training changed in log-probs is there"
        said += " (--dtype float32 keeps all; the adapter form is exact)"
    if drift is not None:
        said += (
            f"; the policy was trained on a 4-bit base, from which they differ by {drift.mean:.2g} nats per token on "
            f"average and {drift.largest:.2g} at most: evaluate them before use, or take the adapter form on that base"
        )
    return said


def _tokenizer(policy: CausalPolicy, tokenizer: Any, prompts: PromptBatch) -> str | None:
    """Return what is wrong with a reloaded tokenizer."""
    own = policy.tokenizer
    if own.chat_template != tokenizer.chat_template:
        return "the chat template is not the policy's"
    for row in prompts.rows:
        if own(row.prompt)["input_ids"] != tokenizer(row.prompt)["input_ids"]:
            return f"the tokenizer reads the prompt {row.prompt[:40]!r} otherwise"
    return None
