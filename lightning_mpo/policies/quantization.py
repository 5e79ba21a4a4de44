"""A base in 4 bits under adapters, by bitsandbytes (QLoRA, arXiv:2305.14314).

Quantised are the linear layers of the trunk. Embeddings, norms and the head stay in `policy.dtype`: scoring reads rows of
the head. Adapters are never merged into a quantised base: a merge passes next to nothing of a small update on, and moves
the base, which is the reference.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.loading import load_weights

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a frozen base are stored and multiplied.

    Args:
        bits: 4. LLM.int8 is refused: it picks outliers by the batch, so that log-probs depend on the rows beside.
        kind: of 4-bit numbers.
        double: quantise the scales of blocks, too: about 0.4 bits per weight less.
        compute_dtype: of the products.
    """

    bits: int = 4
    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits == 8:
            raise UserError(
                "`quantization.bits: 8` (LLM.int8) picks outliers by the batch, so that log-probs of a row depend on the "
                "rows beside it and sampler and trainer disagree; use 4, or `policy.dtype: bfloat16` without quantisation"
            )
        if self.bits != 4:
            raise UserError(f"`quantization.bits` must be 4, got {self.bits}")

    def config(self) -> BitsAndBytesConfig:
        """Return what `from_pretrained` takes."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def load(
        self, location: str, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        """Return a model that is quantised while it is read, so that it never stands in memory as it was.

        Args:
            location: what `from_pretrained` takes.
            config: of the model.
            dtype: of what is not quantised: embeddings, norms and head.
            device: where the weights go; they cannot be moved afterwards.

        Raises:
            UserError: bitsandbytes has no kernel for the device.
        """
        self.check_kernels(device)
        place = (
            device
            if device.index is not None or device.type == "cpu"
            else torch.device(device.type, 0)
        )
        options: dict[str, Any] = {"quantization_config": self.config(), "device_map": {"": place}}
        network = load_weights(location, config, dtype, **options)
        keep_layout(network)
        if device.type == "cpu":
            _unmap(network)
        _give_back()
        return network

    def bytes_per_weight(self) -> float:
        """Return the bytes that a weight of a quantised layer takes, scales of blocks of 64 (and 256) included."""
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.double else 4 / 64)

    def check_kernels(self, device: torch.device) -> None:
        """Quantise, multiply and differentiate a small layer on the device.

        Raises:
            UserError: bitsandbytes cannot be imported, or has no kernel for the device.
        """
        noisy = "bitsandbytes.backends.cpu.ops"  # misses a kernel of the hub, and works
        logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            import bitsandbytes as bnb

            options: dict[str, Any] = {"compress_statistics": self.double, "quant_type": self.kind}
            dtype = getattr(torch, self.compute_dtype)
            layer: nn.Module = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, **options)
            dense: Tensor = layer.weight.detach().clone()  # type: ignore[operator]
            layer = layer.to(device)
            hidden = torch.eye(64, device=device, requires_grad=True)
            layer(hidden).float().sum().backward()
            error = (hidden.grad[0].cpu() - dense.sum(0)).norm() / dense.sum(0).norm()  # type: ignore[index]
            if not error < 0.3:
                raise RuntimeError(f"a product is off by {float(error):.0%}")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"`policy.quantization` needs bitsandbytes with 4-bit kernels for {device.type}, which do not "
                f"work here ({reason}); install a bitsandbytes for this machine, or set `policy.quantization: null`"
            ) from error


def _unmap(network: nn.Module) -> None:
    """Copy unquantised weights: if their dtype is that of the file, they are views that keep the whole file in memory."""
    for weight in network.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()


def _give_back() -> None:
    """Return to the system what reading and quantising left in the C library's heap."""
    gc.collect()
    trim: Any = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )  # glibc's
    if trim is not None:
        trim(0)


def keep_layout(network: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights in place.

    On CPUs with AVX512-BF16 bitsandbytes repacks at the first forward in eval mode, and the packed product has no
    gradient of its input: training after a rollout would go on with wrong gradients, and without an error.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def refuse_stored_otherwise(config: PretrainedConfig, quantization: Quantization | None) -> None:
    """Refuse a folder with quantised weights, unless `quantization` asks for the same method.

    Raises:
        UserError: they are quantised by another method, or `quantization` is not set.
    """
    held: Any = getattr(config, "quantization_config", None)
    if held is None:
        return
    held = held if isinstance(held, dict) else held.to_dict()
    if not held.get("load_in_4bit"):
        raise UserError(
            f"the weights of `policy.source` are stored quantised ({held.get('quant_method')}, not in 4 bits of "
            "bitsandbytes), which cannot be trained here; name the model in 16 or 32 bits and give `policy.quantization`"
        )
    if quantization is None:
        raise UserError(
            "the weights of `policy.source` are stored in 4 bits; give `policy.quantization` and `policy.lora`, or name "
            "the model in 16 or 32 bits"
        )


@dataclass(frozen=True)
class Agreement:
    """Gradients after a forward pass in rollout mode beside those before: cosine and ratio of norms, 1 where all is well."""

    cosine: float
    ratio: float

    @property
    def holds(self) -> bool:
        """Whether only rounding lies between them."""
        return self.cosine > 0.99 and 0.95 < self.ratio < 1.05


def compare_gradients(network: PreTrainedModel) -> Agreement:
    """Differentiate a few tokens before and after a forward pass as rollouts make it. In train mode; nothing is changed."""
    before = _gradients(network)
    with rollout_mode(network):
        network.get_decoder()(input_ids=_some_tokens(network), use_cache=False)
    after = _gradients(network)
    norms = before.norm(), after.norm()
    return Agreement(
        float(before @ after / (norms[0] * norms[1]).clamp(min=1e-30)),
        float(norms[1] / norms[0].clamp(min=1e-30)),
    )


def check_gradients(network: PreTrainedModel) -> None:
    """Refuse to train where a rollout changes the gradients of the same weights.

    Raises:
        UserError: they differ by more than rounding.
    """
    found = compare_gradients(network)
    if not found.holds:
        raise UserError(
            f"gradients of the quantised policy change with a rollout (cosine {found.cosine:.2f}, norm times "
            f"{found.ratio:.2f}, on the same weights and tokens), so that training would go wrong without an error: a "
            "forward pass in eval mode has repacked the quantised weights. Update bitsandbytes, or set "
            "`policy.quantization: null`"
        )


def _some_tokens(network: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 9, device=network.device)
    return ids.remainder(network.config.get_text_config().vocab_size)[None]


def _gradients(network: PreTrainedModel) -> Tensor:
    """Return the gradients of the trained weights below the head as one vector, under one seed of the dropout."""
    decoder = network.get_decoder()
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    with torch.random.fork_rng([network.device] if network.device.type == "cuda" else []):
        torch.manual_seed(0)
        hidden_1TD = decoder(
            input_ids=_some_tokens(network), use_cache=False
        ).last_hidden_state.float()
        direction_1TD = torch.randn(hidden_1TD.shape).to(hidden_1TD.device)
    found = torch.autograd.grad((hidden_1TD * direction_1TD).sum(), weights, allow_unused=True)
    return torch.cat([gradient.float().flatten() for gradient in found if gradient is not None])


def quantised_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of quantised layers: weights and their scales."""
    for name, module in network.named_modules():
        weight: Any = dict(module.named_parameters(recurse=False)).get(
            "weight"
        )  # peft's wrappers pass on another's
        if weight is None or weight.is_floating_point():
            continue
        yield f"{name}.weight", weight.detach()
        state: Any = getattr(weight, "quant_state", None)
        while state is not None:  # the scales' own scales under double quantisation
            for key in ("absmax", "code", "offset"):
                part = getattr(state, key, None)
                if isinstance(part, Tensor):
                    yield f"{name}.{key}", part.detach()
            state, name = getattr(state, "state2", None), f"{name}.state2"


def fingerprints(network: nn.Module) -> dict[str, int]:
    """Return a checksum of each tensor of the quantised layers, computed where it is.

    A sum of bytes, each times an odd number that depends on its place, modulo 2⁶⁴: one changed byte always changes it.
    """
    return {name: _checksum(tensor) for name, tensor in quantised_tensors(network)}


def _checksum(tensor: Tensor) -> int:
    total = 0
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for index, part in enumerate(flat.split(2**20)):
        odd = torch.arange(len(part), device=part.device) * 2 + 1
        total += int((part * odd).sum()) * (2 * index + 1)
    return total % 2**64


def check_moved(network: nn.Module, before: dict[str, int]) -> None:
    """Compare the quantised layers with checksums taken before.

    Raises:
        UserError: a byte moved; names the tensors.
    """
    after = fingerprints(network)
    moved = [name for name in before if after.get(name) != before[name]]
    if moved:
        raise UserError(
            f"{len(moved)} of {len(before)} tensors of the quantised base moved, the first is `{moved[0]}`: policy and "
            "reference are no longer what was loaded, so the run stops. Something wrote into the base: a merge of "
            "adapters, or a kernel that repacks weights in place"
        )
