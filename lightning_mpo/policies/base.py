"""What the rest of the package asks of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mpo.objective import TokenScores
from lightning_mpo.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Policy(nn.Module, ABC):
    """A distribution over responses. Constructing one loads nothing; `build` does."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loading it loads no weights."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V, known before the weights are loaded."""

    @property
    @abstractmethod
    def end_tokens(self) -> list[int]:
        """Ids that end a response."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what can be refused before the weights are loaded."""

    @abstractmethod
    def build(self, *, device: torch.device, reference: bool) -> None:
        """Load the weights; with `reference`, keep the initial policy scorable. A second call does nothing."""

    @abstractmethod
    def score(
        self,
        rollout: Rollout,
        mask_BT: Tensor,
        *,
        temperature: float,
        entropy_grad: bool = False,
        reference: bool = False,
    ) -> TokenScores:
        """Return log-probs of the response tokens where `mask_BT` holds, on the rollout's stored support.

        Args:
            rollout: rows to score.
            mask_BT: a part of `rollout.response_mask_BT`.
            temperature: what logits are divided by, as in the rollout.
            entropy_grad: whether the entropy carries gradient.
            reference: ask the reference instead of the policy.
        """

    @abstractmethod
    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of a module's state dict that a checkpoint needs: what is trained, not what is reloaded."""


@contextmanager
def rollout_mode(policy: nn.Module) -> Iterator[None]:
    """Evaluate without gradient, dropout or gradient checkpointing; restore every module's mode on the way out.

    Generation in train mode with checkpointing on drops the KV cache and returns wrong tokens, and a model left in
    eval mode afterwards trains without checkpointing: both were measured.
    """
    modes = {module: module.training for module in policy.modules()}
    checkpointing = [module for module in policy.modules() if getattr(module, "gradient_checkpointing", False)]
    policy.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.no_grad():
            yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, training in modes.items():
            module.training = training
