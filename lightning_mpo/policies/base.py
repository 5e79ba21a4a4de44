"""The interface of a policy, as the rest of the package uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Shards(ABC):
    """The weights of a policy, spread over processes. Both contexts are collectives."""

    @abstractmethod
    def full_weights(self) -> AbstractContextManager[None]:
        """Hold all weights on each process within this context."""

    @abstractmethod
    def lockstep(self) -> AbstractContextManager[None]:
        """Allow different numbers of passes without gradient on each process."""


class Policy(nn.Module, ABC):
    """A distribution over responses. Constructing one loads nothing; `build` does."""

    masked = False
    """True for a masked language model, which scores the noised copies that a rollout holds."""
    cold_parts: frozenset[str] = frozenset()
    """Parts with initial weights after `build`: heads or critic that no checkpoint held."""
    shards: Shards | None = None
    """The weights, if they are spread over processes."""
    fixed_bar: tuple[int, ...] = ()
    """Ids that the support of an objective bars at every step; `bar` sets them."""
    can_bar = False
    """True if sampler, score, reference and heads give the ids of `fixed_bar` probability 0."""

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

    @property
    def barred(self) -> tuple[int, ...]:
        """Ids that sampler, score, reference and heads give probability 0, such as MASK."""
        return self.fixed_bar

    def bar(self, ids: Sequence[int]) -> None:
        """Give ids probability 0 from now on, in place of those of an earlier call.

        Args:
            ids: for sampler, score, reference and heads alike.

        Raises:
            UserError: this policy cannot bar ids.
        """
        if ids and not self.can_bar:
            raise UserError(
                f"`AllowedTokens` bars ids, which {type(self).__name__} cannot: use `support: "
                "FullVocabulary`, or set `can_bar = True` in a class that scores with `fixed_bar`"
            )
        self.fixed_bar = tuple(sorted(set(ids)))

    @contextmanager
    def without_fixed_bar(self) -> Iterator[None]:
        """Allow all ids of the network within this context, to compare it with another network."""
        ids = self.fixed_bar
        self.bar(())
        try:
            yield
        finally:
            self.bar(ids)

    @property
    def positions(self) -> int | None:
        """Most tokens of a row, prompt and response together; None: no limit."""
        return None

    @property
    def remarks(self) -> list[str]:
        """Lines that a user should read before the model is loaded."""
        return []

    @property
    def unembedded(self) -> dict[str, int]:
        """Texts and ids of tokens that the tokenizer has and the model has no embedding for."""
        return {}

    @abstractmethod
    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        """Refuse options and requests that cannot work, before the weights are loaded."""

    @abstractmethod
    def build(self, *, device: torch.device, reference: bool) -> None:
        """Load the weights. A second call does nothing.

        Args:
            device: of the weights.
            reference: keep the initial policy as the reference.
        """

    @abstractmethod
    def score(
        self,
        rollout: Rollout,
        mask_BT: Tensor,
        *,
        temperature: float,
        request: ScoreRequest = ScoreRequest(),  # noqa: B008  frozen
        reference: bool = False,
    ) -> TokenScores:
        """Return log-probs of response tokens, on the rollout's stored support.

        Args:
            rollout: rows to score.
            mask_BT: tokens to score, a part of `rollout.response_mask_BT`.
            temperature: divisor of the logits, as in the rollout.
            request: scores to compute besides log-probs and entropy.
            reference: score with the reference instead of the policy.
        """

    @abstractmethod
    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained part of a module's state dict; the rest is loaded from its source."""

    def full_weights(self) -> AbstractContextManager[None]:
        """Hold all weights on each process within this context; collective for shards."""
        return nullcontext() if self.shards is None else self.shards.full_weights()

    def lockstep(self) -> AbstractContextManager[None]:
        """Allow different numbers of passes on each process; collective for shards."""
        return nullcontext() if self.shards is None else self.shards.lockstep()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained weights by part, in the order policy, mtp, critic.

        Each part has its own gradient norm and clipping, and may have its own learning rate.
        """
        parts: dict[str, list[nn.Parameter]] = {"policy": [], "mtp": [], "critic": []}
        for name, weight in self.named_parameters():
            if weight.requires_grad:
                part = name.split(".", 1)[0]
                parts[part if part in parts else "policy"].append(weight)
        return {part: weights for part, weights in parts.items() if weights}

    def freeze_unused(self, request: ScoreRequest) -> None:
        """Freeze heads or critic without a use in a request: DDP would wait for their gradients."""
        for part, used in (("mtp", request.future > 0), ("critic", request.values)):
            for weight in () if used else self.parts().get(part, ()):
                weight.requires_grad_(False)

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token id."""
        return self.tokenizer.batch_decode([[i] for i in range(self.vocabulary)])

    def describe_heads(self) -> dict[str, Any] | None:
        """Return facts in which heads and a checkpoint must agree; None without heads."""
        return None

    def check_heads(self, description: dict[str, Any] | None, where: str) -> None:
        """Refuse a checkpoint whose heads are of another family, size or trunk."""
        heads = self.describe_heads()
        if heads is None or description is None or heads == description:
            return
        name = next(key for key in heads if heads[key] != description.get(key))
        raise UserError(
            f"{where} holds multi-token heads with {name} {description.get(name)!r}, `policy.mtp` "
            f"has {heads[name]!r}"
        )


def parameter_groups(policy: Policy, learning_rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, one per part of the policy.

    Raises:
        UserError: a learning rate for a part that is not there.
    """
    parts = policy.parts()
    unknown = [name for name in learning_rates if name not in parts]
    if unknown:
        raise UserError(
            f"`learning_rates` names {unknown[0]!r}, which is not trained; there are "
            f"{sorted(parts)}"
        )
    return [
        {"params": weights} | ({"lr": learning_rates[name]} if name in learning_rates else {})
        for name, weights in parts.items()
    ]


def check_schedule(
    optimizer: torch.optim.Optimizer, policy: Policy, learning_rates: Mapping[str, float]
) -> None:
    """Refuse a scheduler that has replaced the learning rate of a part, as `OneCycleLR` does.

    Raises:
        UserError: a peak that is not the part's learning rate.
    """
    parts = list(policy.parts())
    for part, group in zip(parts, optimizer.param_groups, strict=True):
        rate = learning_rates.get(part)
        if rate is not None and group.get("max_lr", rate) != rate:
            raise UserError(
                f"the scheduler's `max_lr` ({group['max_lr']:g}) replaces `learning_rates.{part}` "
                f"({rate:g}); give `max_lr` as a list with one rate per part, in the order "
                f"{', '.join(parts)}"
            )


@contextmanager
def rollout_mode(policy: nn.Module) -> Iterator[None]:
    """Evaluate without gradient, dropout or gradient checkpointing; restore all modes at the end.

    Generation in train mode with checkpointing on drops the KV cache and returns wrong tokens, and
    a model left in eval mode afterwards trains without checkpointing: both were measured.
    """
    modes = {module: module.training for module in policy.modules()}
    checkpointing: list[Any] = [
        module for module in policy.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    policy.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False
    together = policy.lockstep() if isinstance(policy, Policy) else nullcontext()
    try:
        with torch.no_grad(), together:
            yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, training in modes.items():
            module.training = training
