"""`lightning_mpo.json` of an exported folder: its usage, as plain values that are checked.

A configuration names classes to build and is code. A folder may come from anybody, so it holds data
only: its form, the text around a prompt, and the sampling options. `predict --model` builds
everything else itself.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.export.folder import USAGE, Sampling
from lightning_mpo.export.forms import FORMS
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.lora import Lora
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.policies.model_files import read_json
from lightning_mpo.policies.quantization import Quantization
from lightning_mpo.sampling.diffusion import DiffusionSampler

VERSION = 1
Check = Callable[[Any], bool]


def whole(value: Any) -> bool:
    """Whether a value is a whole number of at least 1, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def positive(value: Any) -> bool:
    """Whether a value is a finite number above 0, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _layers(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and bool(value) and all(map(_text, value)))


def _of(*choices: Any) -> Check:
    return lambda value: any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    )


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


DTYPES = ("float32", "bfloat16")
TOP: dict[str, tuple[Check, str]] = {
    "version": (_of(VERSION), str(VERSION)),
    "form": (_of(*FORMS), f"one of {', '.join(FORMS)}"),
    "dtype": (_of(*DTYPES), f"one of {', '.join(DTYPES)}"),
    "seed": (lambda value: value == 0 or whole(value), "a whole number"),
    "temperature": (positive, "a number above 0"),
    "max_new_tokens": (whole, "a whole number of at least 1"),
    "prompt": (lambda value: isinstance(value, dict), "an object"),
    "adapter": (lambda value: isinstance(value, dict), "an object"),
    "masked": (lambda value: isinstance(value, dict), "an object"),
}
REMASKING = ("low_confidence", "random", "entropy")
MASKED: dict[str, tuple[Check, str]] = {
    "mask_token": (_or_none(lambda value: _text(value) and value != ""), "text or null"),
    "shift": (_of(True, False), "true or false"),
    "block": (whole, "a whole number of at least 1"),
    "tokens_per_step": (whole, "a whole number of at least 1"),
    "remasking": (_of(*REMASKING), f"one of {', '.join(REMASKING)}"),
}
PROMPT: dict[str, tuple[Check, str]] = {
    "chat_template": (_of(True, False), "true or false"),
    "instruction": (_text, "text"),
    "system": (_or_none(_text), "text or null"),
    "suffix": (_text, "text"),
    "template_arguments": (_or_none(lambda value: isinstance(value, dict)), "an object"),
    "control_tokens": (_of(True, False, None), "true, false or null"),
    "max_prompt_tokens": (_or_none(whole), "a whole number of at least 1"),
}
ADAPTER: dict[str, tuple[Check, str]] = {
    "base": (lambda value: _text(value) and value != "", "a model's name"),
    "rank": (whole, "a whole number of at least 1"),
    "alpha": (whole, "a whole number of at least 1"),
    "targets": (_layers, "a name or a list of names"),
    "dropout": (_share, "in [0, 1)"),
    "quantization": (lambda value: value is None or isinstance(value, dict), "an object or null"),
}
QUANTIZATION: dict[str, tuple[Check, str]] = {
    "bits": (_of(4), "4"),
    "kind": (_of("nf4", "fp4"), "nf4 or fp4"),
    "double": (_of(True, False), "true or false"),
    "compute_dtype": (_of("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
}


@dataclass(frozen=True)
class Usage:
    """How to use an exported folder.

    Args:
        form: content of the folder: `adapter`, `merged` or `full`.
        dtype: dtype of the weights; with adapters, that of their base.
        seed: seed of the sampling.
        temperature: temperature of the sampling.
        max_new_tokens: longest response; of a masked policy its canvas.
        prompt: options of a `PromptDataModule` for the text around a prompt.
        adapter: base and sizes of adapters; empty for other forms.
        masked: mask token and sampler of a masked policy; empty for a causal one.
    """

    form: str = "full"
    dtype: str = "float32"
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    prompt: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    masked: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Usage:
        """Read `lightning_mpo.json`; without one, the defaults.

        Raises:
            UserError: it is damaged, or holds an unknown key or a value out of range.
        """
        path = folder / USAGE
        if not path.exists() and not path.is_symlink():
            return cls()
        content = read_json(path, f"the exported folder {str(folder)!r}")
        _check(content, TOP, f"{path}: ")
        _check(content.get("prompt", {}), PROMPT, f"{path}: prompt.")
        adapter = content.get("adapter", {})
        _check(adapter, ADAPTER, f"{path}: adapter.")
        _check(adapter.get("quantization") or {}, QUANTIZATION, f"{path}: adapter.quantization.")
        masked = content.get("masked", {})
        _check(masked, MASKED, f"{path}: masked.")
        missing = [key for key in ("version", "form") if key not in content]
        if content.get("form") == "adapter":
            missing += [
                f"adapter.{key}"
                for key in ("base", "rank", "alpha", "targets")
                if key not in adapter
            ]
        if masked:
            missing += [f"masked.{key}" for key in MASKED if key not in masked]
        if missing:
            raise UserError(f"{path}: `{missing[0]}` is missing")
        del content["version"]
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write `lightning_mpo.json`."""
        content = {"version": VERSION} | asdict(self)
        for key in ("adapter", "masked"):
            if not content[key]:
                del content[key]
        (folder / USAGE).write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def policy(self, folder: str, base: str | None = None) -> LoadedPolicy:
        """Return the policy of a folder; nothing is loaded.

        Args:
            folder: the exported folder; without adapters also another name of a model.
            base: base model of adapters; None: the one that the folder names.
        """
        source, options = folder, dict[str, Any]()
        if self.form == "adapter":
            adapter, source = self.adapter, base or self.adapter["base"]
            quantization = adapter.get("quantization")
            dropout = adapter.get("dropout", 0.0)
            options = {
                "lora": Lora(adapter["rank"], adapter["alpha"], adapter["targets"], dropout),
                "dtype": self.dtype,
                "checkpoint": folder,
                "quantization": None if quantization is None else Quantization(**quantization),
            }
        if not self.masked:
            return CausalPolicy(source, **options)
        options |= {name: self.masked[name] for name in ("mask_token", "shift")}
        return MaskedPolicy(source, **options)

    def sampler(self) -> DiffusionSampler | None:
        """Return the sampler of a masked policy; None: that of a causal one."""
        if not self.masked:
            return None
        names = ("block", "tokens_per_step", "remasking")
        return DiffusionSampler(**{name: self.masked[name] for name in names})


def _check(content: Mapping[str, Any], known: Mapping[str, tuple[Check, str]], where: str) -> None:
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{where}{key[:60]} is not known; there are {', '.join(known)}")
        check, rule = known[key]
        if not check(value):
            raise UserError(f"{where}{key} must be {rule}, got {json.dumps(value)[:60]}")


def usage_of(
    policy: LoadedPolicy, form: str, sampling: Sampling, data: Any, seed: Any, dtype: str
) -> Usage:
    """Return how to use an export of a policy.

    Args:
        policy: the policy to export.
        form: form of the export.
        sampling: as in training.
        data: the run's data module, whose options shape prompts; None: not known.
        seed: seed of the run, or None.
        dtype: dtype of the weights; with adapters, that of their base.
    """
    prompt = {name: getattr(data, name) for name in prompt_options() if hasattr(data, name)}
    if getattr(data, "few_shot", None):
        rank_zero_warn(
            f"the export does not hold the {data.few_shot} examples of `data.few_shot`; write them "
            "into its prompts"
        )
    adapter: dict[str, Any] = {}
    if form == "adapter":
        assert policy.lora is not None
        quantization = policy.quantization
        adapter = {
            "base": policy.source,
            **asdict(policy.lora),
            "quantization": asdict(quantization)
            if isinstance(quantization, Quantization)
            else None,
        }
    masked = _masked(policy, sampling) if isinstance(policy, MaskedPolicy) else {}
    seed = seed if isinstance(seed, int) and TOP["seed"][0](seed) else 0
    length = sampling.max_new_tokens
    return Usage(form, dtype, seed, sampling.temperature, length, prompt, adapter, masked)


def _masked(policy: MaskedPolicy, sampling: Sampling) -> dict[str, Any]:
    """Return the mask token and the sampler of a masked policy; one block if none is known."""
    sampler = sampling.sampler
    if not isinstance(sampler, DiffusionSampler):
        sampler = DiffusionSampler(sampling.max_new_tokens)
    text = policy.tokenizer.convert_ids_to_tokens(policy.mask_id)
    return {
        "mask_token": text if isinstance(text, str) else None,
        "shift": policy.shift,
        "block": sampler.block,
        "tokens_per_step": sampler.tokens_per_step,
        "remasking": sampler.remasking,
    }


def prompt_options() -> list[str]:
    """Return the options of data modules that a folder may set."""
    return [
        name for name in inspect.signature(PromptDataModule.__init__).parameters if name in PROMPT
    ]
