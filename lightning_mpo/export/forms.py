"""The three forms of an exported policy, and how a user loads each again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mpo.errors import UserError
from lightning_mpo.export.reloaded import Reloaded, ReloadedMasked
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.checkpoints import ADAPTER_CONFIG
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.loading import load_tokenizer, load_weights
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.policies.model_kinds import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ("adapter", "merged", "full")


def check_form(policy: LoadedPolicy, form: str) -> None:
    """Refuse a form that the policy does not have, before its weights are loaded.

    Raises:
        UserError: adapters or a merge were chosen without LoRA, or all weights with it; the base
            exists only quantised; or the model has code of its own, whose weights are not exported.
    """
    if form not in FORMS:
        raise UserError(f"the form must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "full" and policy.lora is None:
        raise UserError(
            f"the form {form!r} needs adapters and the policy has no `policy.lora`: take the form "
            "'full'"
        )
    if form == "full" and policy.lora is not None:
        raise UserError(
            "the form 'full' is for policies without `policy.lora`: take 'adapter', or 'merged'"
        )
    if form == "merged" and getattr(policy.config, "quantization_config", None) is not None:
        raise UserError(
            f"the base {policy.source!r} is stored quantised, and adapters are only merged into "
            "unquantised weights: give `--model.init_args.policy.init_args.source` the model it "
            "was made from, or take the form 'adapter'"
        )
    if form != "adapter" and policy.kind.foreign(policy.config):
        raise UserError(
            f"the network of the base {policy.source!r} is code of its repository, which an "
            "exported folder does not hold: train adapters (`policy.lora`) and take the form "
            "'adapter'"
        )


def write_adapter(policy: LoadedPolicy, folder: Path) -> None:
    """Write the adapters alone, as peft does."""
    # "auto" would look the base up on the hub
    policy.adapters.save_pretrained(folder, save_embedding_layers=False)
    # the name of the base instead of its folder on this machine
    path = folder / ADAPTER_CONFIG
    described = json.loads(path.read_text())
    described["base_model_name_or_path"] = policy.source
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def write_full(policy: LoadedPolicy, folder: Path) -> None:
    """Write all weights, as they are."""
    policy.network.save_pretrained(folder)


def write_merged(policy: LoadedPolicy, folder: Path, dtype: torch.dtype) -> None:
    """Write the unquantised base with the adapters added to it, rounded once to `dtype`."""
    network: Any = policy.network
    if dtype == torch.float32:
        network.to(dtype)
    _untie_adapted_head(network)
    with torch.no_grad():
        policy.adapters.merge_and_unload()
    network.to(dtype).save_pretrained(folder)


def unquantised(policy: LoadedPolicy) -> LoadedPolicy:
    """Return the policy rebuilt on an unquantised base, on the CPU; merges are done in it."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(policy, Path(folder))
        dtype: Any = str(policy.dtype).removeprefix("torch.")
        options: dict[str, Any] = {"lora": policy.lora, "dtype": dtype, "checkpoint": folder}
        twin: LoadedPolicy
        if isinstance(policy, MaskedPolicy):
            names = ("mask_token", "shift", "remote_code")
            options |= {name: getattr(policy, name) for name in names}
            twin = MaskedPolicy(policy.source, **options)
        else:
            twin = CausalPolicy(policy.source, **options)
        twin.build(device=torch.device("cpu"), reference=False)
    return twin


def _untie_adapted_head(network: PreTrainedModel) -> None:
    """Untie an adapted head from the embedding, which a merge would change otherwise."""
    head: Any = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    base = getattr(head, "base_layer", None)
    if base is None or base.weight is not embedding.weight:
        return
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    for config in (network.config, network.config.get_text_config()):
        config.tie_word_embeddings = False


def reload(policy: LoadedPolicy, folder: Path, form: str) -> Reloaded:
    """Load an exported folder as a user does, on the policy's device.

    Args:
        policy: the exported policy; adapters are put on its base.
        folder: the exported folder.
        form: its form.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    kind = ModelKind(masked=policy.masked)
    if form == "adapter":
        network: Any = PeftModel.from_pretrained(policy.load_base(policy.device), folder)
    else:
        network = load_weights(str(folder), None, torch.float32, kind=kind)
    network = network.to(policy.device).eval()
    tokenizer, generation = (
        load_tokenizer(str(folder), kind),
        GenerationConfig.from_pretrained(folder),
    )
    if isinstance(policy, MaskedPolicy):
        return ReloadedMasked(network, tokenizer, generation, policy)
    return Reloaded(network, tokenizer, generation)
