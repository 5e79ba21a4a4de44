"""The support whose first step has tokens of its own: a response begins with one of a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Outside, Support
from lightning_mpo.objective.token_ids import check_tokens, exact_ids


@dataclass(frozen=True)
class FirstTokens(Support):
    r"""The first token of a response is one of a few; later tokens are those of another support.

        P_0 = {tokens},   P_t = then(s_t) for t > 0     [I] (docs/ra3.md)

    With `tokens: ["\n", "#"]` the policy of an E-step either acts or begins a comment [S]. The
    softmax of the first step is taken over these tokens alone. Positions of which no id is stored
    have the whole vocabulary.

    Args:
        tokens: ids, or texts of single tokens.
        then: support of all later tokens.
    """

    tokens: list[int | str]
    then: Support = FullVocabulary()

    def __post_init__(self) -> None:
        if not self.tokens or isinstance(self.tokens, str):
            raise UserError(
                f"`FirstTokens.tokens` must be a list of ids or texts, got {self.tokens!r}"
            )
        check_tokens("FirstTokens.tokens", self.tokens)
        if self.then.by_step:
            raise UserError("`FirstTokens.then` must be another support than `FirstTokens`")

    by_step = True

    @property
    def from_reference(self) -> bool:  # type: ignore[override]
        return self.then.from_reference

    @property
    def outside(self) -> Outside:  # type: ignore[override]
        return self.then.outside

    @property
    def slots(self) -> int:
        return max(len(self.tokens), self.then.slots or 0)

    @property
    def fixed(self) -> FullVocabulary:
        return self.then.fixed

    @property
    def some_whole(self) -> bool:
        return self.then.some_whole

    def select(self, logits_BV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the support of a later step."""
        return self.then.select(logits_BV)

    def at(self, step: int) -> Support:
        return self.then if step else OnlyTokens(self.tokens)

    def resolved(self, texts: Callable[[], Sequence[str]]) -> FirstTokens:
        ids = exact_ids("FirstTokens.tokens", self.tokens, texts())
        if len(set(ids)) < len(ids):
            raise UserError(f"`FirstTokens.tokens` names a token twice: {self.tokens!r}")
        return replace(self, tokens=list(ids))

    def check(self, vocabulary: int) -> None:
        self.then.check(vocabulary)


class OnlyTokens(Support):
    """The same tokens at each step: the first step of `FirstTokens`.

    Args:
        tokens: their ids.
    """

    def __init__(self, tokens: list[int | str]) -> None:
        check_tokens("OnlyTokens.tokens", tokens)
        if not all(isinstance(token, int) for token in tokens):
            raise RuntimeError("`FirstTokens` must be `resolved` before it is used")
        self.tokens = [int(token) for token in tokens]

    @property
    def slots(self) -> int:
        return len(self.tokens)

    def select(self, logits_BV: Tensor) -> tuple[Tensor, None]:
        ids_K = torch.tensor(self.tokens, dtype=torch.int32, device=logits_BV.device)
        return ids_K.expand(len(logits_BV), -1), None
