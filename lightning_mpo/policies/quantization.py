"""A base in 4 bits under adapters, by bitsandbytes (QLoRA, arXiv:2305.14314).

Quantised are the linear layers of the trunk. Embeddings, norms and the head stay in `policy.dtype`:
scoring reads rows of the head. Adapters are never merged into a quantised base: a merge passes next
to nothing of a small update on, and moves the base, which is the reference.
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
from lightning_mpo.policies.model_kinds import CAUSAL, ModelKind

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Quantization:
    """Storage and products of the linear layers of a frozen base.

    Args:
        bits: 4. LLM.int8 is refused: it picks outliers by the batch, so that log-probs depend on
            the rows beside.
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
                "`quantization.bits: 8` (LLM.int8) picks outliers by the batch, so that log-probs "
                "of a row depend on the rows beside it and sampler and trainer disagree; use 4, "
                "or `policy.dtype: bfloat16` without quantisation"
            )
        if self.bits != 4:
            raise UserError(f"`quantization.bits` must be 4, got {self.bits}")

    def config(self) -> BitsAndBytesConfig:
        """Return the options for `from_pretrained`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )

    def load(
        self,
        location: str,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kind: ModelKind = CAUSAL,
    ) -> PreTrainedModel:
        """Return a model that is quantised while it is read: memory never holds it unquantised.

        Args:
            location: a folder or an id on the hub.
            config: of the model.
            dtype: of embeddings, norms and head, which are not quantised.
            device: of the weights, which cannot be moved afterwards.
            kind: of the model.

        Raises:
            UserError: bitsandbytes has no kernel for the device.
        """
        self.check_kernels(device)
        if device.index is None and device.type != "cpu":
            device = torch.device(device.type, 0)
        device_map = {"": device}
        options: dict[str, Any] = {"quantization_config": self.config(), "device_map": device_map}
        network = load_weights(location, config, dtype, kind=kind, **options)
        keep_layout(network)
        if device.type == "cpu":
            _unmap(network)
        _give_back()
        return network

    def bytes_per_weight(self) -> float:
        """Return the bytes of a quantised weight with its share of the scales."""
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
            layer: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, **options)
            dense: Tensor = layer.weight.detach().clone()
            layer = layer.to(device)
            # the gradient of a sum of products with the identity is a row of column sums
            hidden = torch.eye(64, device=device, requires_grad=True)
            layer(hidden).float().sum().backward()
            assert hidden.grad is not None
            expected = dense.sum(0)
            error = (hidden.grad[0].cpu() - expected).norm() / expected.norm()
            if not error < 0.3:
                raise RuntimeError(f"a product is off by {float(error):.0%}")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"`policy.quantization` needs bitsandbytes with 4-bit kernels for {device.type}, "
                f"which do not work here ({reason}); install a bitsandbytes for this machine, or "
                "set `policy.quantization: null`"
            ) from error


def _unmap(network: nn.Module) -> None:
    """Copy unquantised weights, which may be views of the mapped file and keep it in memory."""
    for weight in network.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()


def _give_back() -> None:
    """Return free memory of the C library's heap to the system, after reading and quantising."""
    gc.collect()
    trim: Any = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )  # glibc's
    if trim is not None:
        trim(0)


def keep_layout(network: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights in place.

    On CPUs with AVX512-BF16 bitsandbytes repacks at the first forward in eval mode, and the packed
    product has no gradient of its input: training after a rollout would go on with wrong gradients,
    and without an error.
    """
    modules: Iterator[Any] = network.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
            f"the weights of `policy.source` are stored quantised ({held.get('quant_method')}, not "
            "in 4 bits of bitsandbytes), which cannot be trained here; name the model in 16 or 32 "
            "bits and give `policy.quantization`"
        )
    if quantization is None:
        raise UserError(
            "the weights of `policy.source` are stored in 4 bits; give `policy.quantization` and "
            "`policy.lora`, or name the model in 16 or 32 bits"
        )


@dataclass(frozen=True)
class Agreement:
    """Cosine and ratio of norms of two gradients, before and after a pass in rollout mode.

    Both are 1 if the pass changes nothing.
    """

    cosine: float
    ratio: float

    @property
    def holds(self) -> bool:
        """True if the gradients differ by rounding alone."""
        return self.cosine > 0.99 and 0.95 < self.ratio < 1.05


def compare_gradients(network: PreTrainedModel) -> Agreement:
    """Compare gradients of a few tokens before and after a pass in rollout mode.

    Args:
        network: in train mode; nothing is changed.
    """
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
    agreement = compare_gradients(network)
    if not agreement.holds:
        raise UserError(
            "gradients of the quantised policy change with a rollout (cosine "
            f"{agreement.cosine:.2f}, norm times {agreement.ratio:.2f}, on the same weights and "
            "tokens), so that training would go wrong without an error: a forward pass in eval "
            "mode has repacked the quantised weights. Update bitsandbytes, or set "
            "`policy.quantization: null`"
        )


def _some_tokens(network: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 9, device=network.device)
    return ids.remainder(network.config.get_text_config().vocab_size)[None]


def _gradients(network: PreTrainedModel) -> Tensor:
    """Return the gradients of the trained weights below the head as one vector, for one seed."""
    decoder = network.get_decoder()
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    with torch.random.fork_rng([network.device] if network.device.type == "cuda" else []):
        torch.manual_seed(0)
        hidden_1TD = decoder(
            input_ids=_some_tokens(network), use_cache=False
        ).last_hidden_state.float()
        direction_1TD = torch.randn(hidden_1TD.shape).to(hidden_1TD.device)
    gradients = torch.autograd.grad((hidden_1TD * direction_1TD).sum(), weights, allow_unused=True)
    return torch.cat([g.float().flatten() for g in gradients if g is not None])
