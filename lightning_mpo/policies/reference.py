"""The reference of a policy: a frozen copy of its network, or frozen adapters on the same base."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies.checkpoints import check_checkpoint, load_network
from lightning_mpo.policies.lora import FrozenAdapters, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SOURCE = "source"
"""Value of `policy.reference_checkpoint`: the reference has the weights of `policy.source` alone."""
REFERENCE_OPTION = "policy.reference_checkpoint"
"""Name of the option in messages."""


class WeightPair(NamedTuple):
    """One weight of the policy beside the same weight of the reference."""

    name: str
    policy: Tensor
    reference: Tensor


class Reference(ABC):
    """The frozen policy that a KL term, a reward or a frozen ranking of tokens reads.

    It is the policy at the start of the run, or that of `policy.reference_checkpoint`.
    """

    @property
    @abstractmethod
    def network(self) -> PreTrainedModel:
        """The network that computes log-probs; it is the reference only within `active`."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Make `network` compute as the reference within this context."""

    @abstractmethod
    def weights(self) -> list[WeightPair]:
        """Return the weights in which the reference may differ from the policy."""

    def mix(self, mixup: float) -> None:
        """Set reference <- mixup · policy + (1 - mixup) · reference, weight by weight."""
        for pair in self.weights():
            pair.reference.lerp_(pair.policy, mixup)

    def state(self) -> dict[str, Tensor]:
        """Return the reference's weights of `weights` by name."""
        return {pair.name: pair.reference for pair in self.weights()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors that `state` returned into the reference.

        Raises:
            UserError: names or shapes differ from those of this reference.
        """
        present = self.state()
        different = [
            name
            for name in present.keys() | state.keys()
            if name not in present or name not in state or present[name].shape != state[name].shape
        ]
        if different:
            raise UserError(
                "the reference in the checkpoint does not fit the policy: "
                f"{min(different)!r} is not the same"
            )
        for name, weight in present.items():
            weight.copy_(state[name])


class FrozenCopy(Reference):
    """A second network, whose weights training never changes.

    Args:
        trained: the network of the policy.
        copied: the frozen network, of the same class.
    """

    def __init__(self, trained: PreTrainedModel, copied: PreTrainedModel) -> None:
        self.trained, self.copied = trained, copied

    @property
    def network(self) -> PreTrainedModel:
        return self.copied

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> list[WeightPair]:
        pairs = zip(self.trained.named_parameters(), self.copied.parameters(), strict=True)
        return [WeightPair(name, weight.data, frozen.data) for (name, weight), frozen in pairs]


class AdapterReference(Reference):
    """The base of the policy with adapters off, or with frozen adapters.

    Args:
        adapters: the policy's network as peft wraps it.
        frozen: adapters of the reference; None: adapters off. The first call of `weights` then makes
            frozen ones.
    """

    def __init__(self, adapters: Any, frozen: FrozenAdapters | None = None) -> None:
        self.adapters, self.frozen = adapters, frozen

    @property
    def network(self) -> PreTrainedModel:
        network: PreTrainedModel = self.adapters.get_base_model()
        return network

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.adapters.disable_adapter() if self.frozen is None else self.frozen.inserted():
            yield

    def weights(self) -> list[WeightPair]:
        """Return A and B of each adapter; without frozen adapters make some with B = 0 first."""
        if self.frozen is None:
            self.frozen = FrozenAdapters(self.network, off=True)
        columns = (self.frozen.names, self.frozen.weights, self.frozen.values)
        return [
            WeightPair(name, weight.data, value)
            for name, weight, value in zip(*columns, strict=True)
        ]


def warn_of_no_use() -> None:
    """Warn that the checkpoint of a reference has no effect."""
    rank_zero_warn(
        f"`{REFERENCE_OPTION}` has no effect: nothing in this run uses a reference, such as a "
        "KL penalty or `KLTracking`"
    )


def check_reference(checkpoint: str | None, lora: Lora | None) -> None:
    """Refuse a checkpoint of the reference that does not serve, without loading its tensors.

    Args:
        checkpoint: `policy.reference_checkpoint`.
        lora: the policy's adapters.

    Raises:
        UserError: as for `check_checkpoint`.
    """
    if checkpoint not in (None, SOURCE):
        check_checkpoint(checkpoint, lora, REFERENCE_OPTION)


def frozen_copy(network: PreTrainedModel, checkpoint: str | None) -> PreTrainedModel:
    """Return a frozen copy of a network.

    Args:
        network: is copied as it is now.
        checkpoint: loaded into the copy; None or `SOURCE`: nothing is.

    Raises:
        UserError: the checkpoint does not fit the network.
    """
    copied = copy.deepcopy(network).requires_grad_(False).eval()
    if checkpoint not in (None, SOURCE):
        load_network(copied, checkpoint, REFERENCE_OPTION, adapters=False)
    return copied


def frozen_adapters(network: PreTrainedModel, checkpoint: str | None) -> FrozenAdapters:
    """Return a frozen copy of the adapters in a network.

    Args:
        network: its adapters are copied as they are now.
        checkpoint: loaded into the copy; None: nothing is.

    Raises:
        UserError: the checkpoint does not fit the adapters.
    """
    frozen = FrozenAdapters(network)
    if checkpoint is not None:
        with frozen.inserted():
            load_network(network, checkpoint, REFERENCE_OPTION, adapters=True)
    return frozen


def leave_reference_out(
    policy: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Delete the reference from a state dict: it is rebuilt, never saved."""
    for key in [key for key in state if key.startswith(f"{prefix}reference_network.")]:
        del state[key]


def frozen_tensors(policy: nn.Module) -> list[Tensor]:
    """Return the frozen adapters of a policy's reference, which are no parameters of any module."""
    reference: Any = getattr(policy, "adapter_reference", None)
    frozen = None if reference is None else reference.frozen
    return [] if frozen is None else list(frozen.values)
