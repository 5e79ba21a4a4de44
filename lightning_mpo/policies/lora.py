"""Low-rank adapters, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mpo.checks import at_least, positive, within
from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained in float32 while the base stays frozen.

    Args:
        rank: inner size.
        alpha: scale; updates are multiplied by alpha / rank.
        targets: names of linear layers, or "all-linear" for every one but the head. The head may
            be named (`lm_head`); if it is tied to the embedding, only the head is adapted.
        dropout: probability; 0 keeps sampler and trainer on one distribution.
    """

    rank: int = 16
    alpha: int = 32
    targets: str | list[str] = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("lora", 1, most=65_536, rank=self.rank)
        positive("lora", alpha=self.alpha, note=": adapters would learn nothing")
        within("lora", "[0, 1)", dropout=self.dropout)
        if not self.targets:
            raise UserError("`lora.targets` is empty: name linear layers, or give `all-linear`")

    @property
    def names(self) -> list[str] | None:
        """The names of the adapted layers; None: all-linear."""
        if isinstance(self.targets, str):
            return None if self.targets == "all-linear" else [self.targets]
        return self.targets

    def check_targets(self, network: nn.Module) -> None:
        """Refuse names that no linear layer of a network has.

        Args:
            network: may be on the meta device.

        Raises:
            UserError: lists the unknown names.
        """
        linear_layers = {
            name.rsplit(".", 1)[-1]
            for name, part in network.named_modules()
            if isinstance(part, nn.Linear)
        }
        unknown = [name for name in self.names or [] if name not in linear_layers]
        if unknown:
            raise UserError(
                f"`lora.targets` names no linear layer: {unknown}; there are "
                f"{sorted(linear_layers)}"
            )


def add_adapters(network: PreTrainedModel, lora: Lora) -> Any:
    """Put float32 adapters into the network's linear layers, and freeze the rest."""
    from peft import LoraConfig, get_peft_model

    lora.check_targets(network)
    # peft's class for causal models needs their `generate`
    generates = hasattr(network, "prepare_inputs_for_generation")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.names or "all-linear",
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM" if generates else None,
    )
    return get_peft_model(network, config)


class FrozenAdapters:
    """A frozen copy of the present adapters, swapped in as the reference policy.

    Args:
        network: a network with adapters.
        off: store 0 in place of each B, so that the copy adds nothing to the base.
    """

    def __init__(self, network: nn.Module, off: bool = False) -> None:
        adapters = {name: w for name, w in network.named_parameters() if "lora_" in name}
        self.names = list(adapters)
        self.weights = list(adapters.values())
        self.values = [weight.detach().clone() for weight in self.weights]
        for name, value in zip(self.names, self.values, strict=True):
            if off and "lora_B" in name:
                value.zero_()

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Let the network compute with the frozen values; storage is exchanged, nothing copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, weight in enumerate(self.weights):
            weight.data, self.values[i] = self.values[i], weight.data
