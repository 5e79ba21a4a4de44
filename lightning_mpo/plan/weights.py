"""Bytes of a run's weights and of its optimiser's state, from a model on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.lora import add_adapters
from lightning_mpo.policies.trunk import Trunk

STATE_TABLE = 256
"""Elements of the lookup table of 8-bit optimisers, which all weights share."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights by part.

    Args:
        base: the network without adapters, quantised layers as they will be stored.
        adapters: LoRA's weights.
        extras: heads and critic, by name.
        trained: the trained weights of the network, adapters included.
        largest_trained: the largest of them.
        trained_numbers: how many weights the optimiser has, those of heads and critic included.
        unpacked: the largest quantised layer in 16 bits, as a product unpacks it; 0 without
            quantisation.
    """

    base: int
    adapters: int
    extras: dict[str, int]
    trained: int
    largest_trained: int
    trained_numbers: int
    unpacked: int


def shallow_network(policy: LoadedPolicy, layers: int) -> Any:
    """Return the policy's network with its adapters on the meta device, cut to so many layers."""
    # the configuration of fewer layers
    config = copy.deepcopy(policy.config.get_text_config())
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    # the network without weights
    with torch.device("meta"):
        network = policy.kind.auto_class(config).from_config(
            config, dtype=policy.dtype, trust_remote_code=policy.kind.remote_code
        )
        if policy.lora is not None:
            network = add_adapters(network, policy.lora).get_base_model()
    if policy.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
    return network.train()


def count_weights(policy: LoadedPolicy) -> WeightBytes:
    """Return the bytes of a policy's weights by part; nothing is loaded."""
    network = shallow_network(policy, policy.config.get_text_config().num_hidden_layers)
    weights = dict(network.named_parameters())
    trained = [weight for weight in weights.values() if weight.requires_grad]
    extras = _heads_and_critic(policy, network)
    return WeightBytes(
        base=_base(policy, network),
        adapters=_bytes(weight for name, weight in weights.items() if "lora_" in name),
        extras={name: _bytes(part) for name, part in extras.items()},
        trained=_bytes(trained),
        largest_trained=max(_bytes([weight]) for weight in trained),
        trained_numbers=sum(w.numel() for part in (trained, *extras.values()) for w in part),
        unpacked=_largest_unpacked(policy),
    )


def state_per_number(module: PolicyOptimization) -> float:
    """Return the bytes of optimiser state per trained number, of a small weight after one step."""
    weight = nn.Parameter(torch.zeros(128, 64))
    optimizer = module.optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    values: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    # neither step counters nor shared tables grow with the weight
    moments = [value for value in values if isinstance(value, Tensor) and value.numel() > 1]
    return _bytes(m for m in moments if m.numel() != STATE_TABLE) / weight.numel()


def _heads_and_critic(policy: LoadedPolicy, network: Any) -> dict[str, list[nn.Parameter]]:
    """Return the weights of multi-token heads and critic, on the meta device; all are trained."""
    if policy.mtp is None and policy.critic is None:
        return {}
    decoder, config = network.get_decoder(), policy.config.get_text_config()
    heads, critic = copy.deepcopy(policy.mtp), copy.deepcopy(policy.critic)
    with torch.device("meta"):
        if heads is not None:
            heads.weights_file = None
            heads.build(Trunk(decoder, config, network.get_output_embeddings()))
        if critic is not None:
            critic.build(decoder)
    parts = {"heads": heads, "critic": critic}
    return {name: list(part.parameters()) for name, part in parts.items() if part is not None}


def _base(policy: LoadedPolicy, network: Any) -> int:
    """Return the bytes of the base, those of quantised layers as they will be stored."""
    quantization = policy.quantization
    linear = {id(m.weight) for m in _trunk(policy, network).modules() if isinstance(m, nn.Linear)}
    total = 0.0
    for name, weight in network.named_parameters():
        if "lora_" in name:
            continue
        size: float = weight.element_size()
        if quantization is not None and id(weight) in linear:
            size = quantization.bytes_per_weight()
        total += weight.numel() * size
    return round(total)


def _trunk(policy: LoadedPolicy, network: Any) -> nn.Module:
    """Return the network without its head, the layers of which are quantised."""
    return network.base_model if policy.masked else network.get_decoder()


def _largest_unpacked(policy: LoadedPolicy) -> int:
    if policy.quantization is None:
        return 0
    trunk = _trunk(policy, shallow_network(policy, 1))
    return max(m.weight.numel() for m in trunk.modules() if isinstance(m, nn.Linear)) * 2


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
