"""Axis "support": over which part of the vocabulary the softmax of the policy is taken
(docs/algorithms.md 2).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_mpo.checks import at_least, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import supports as F
from lightning_mpo.objective.axes import Member

Outside = Literal["refuse", "unite", "drop"]


class Support(Member):
    """Chooses the tokens of one step. The rollout stores the choice; every later pass replays
    it.
    """

    from_reference: bool = False
    """Whether the frozen reference ranks the tokens, instead of the policy that samples."""
    outside: Outside = "refuse"
    """What becomes of a sampled token that its stored support lacks."""
    by_step = False
    """Whether the support depends on the position of a token in the response."""

    @property
    def some_whole(self) -> bool:
        """Whether some steps take the whole vocabulary, of which no id is stored."""
        return self.slots is None

    @property
    def slots(self) -> int | None:
        """Ids that are stored per step; None: the support is the whole vocabulary, and none is
        stored.
        """
        return None

    @abstractmethod
    def select(self, logits_BV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return `(support_BK, support_mask_BK)`; `(None, None)` stands for the whole vocabulary.

        Args:
            logits_BV: logits after temperature, of the policy, or of the reference with
                `from_reference`.
        """

    @property
    def fixed(self) -> FullVocabulary:
        """The ids that no step leaves: the whole vocabulary, or the part that `AllowedTokens`
        allows. They are the same at every step, so nothing is stored for them.
        """
        return FullVocabulary()

    def at(self, step: int) -> Support:
        """Return the support of one step, counted from 0: this one, unless it depends on the step."""
        return self

    def resolved(self, texts: Callable[[], Sequence[str]]) -> Support:
        """Return the support with ids in place of texts of tokens.

        Args:
            texts: returns the text of each token of the vocabulary.

        Raises:
            UserError: a text is not that of one token.
        """
        return self

    def check(self, vocabulary: int) -> None:
        """Refuse a support that the vocabulary cannot hold."""


@dataclass(frozen=True)
class FullVocabulary(Support):
    """The ordinary softmax."""

    bars = False
    """True if some ids have probability 0 at every step."""

    @property
    def fixed(self) -> FullVocabulary:
        return self

    def select(self, logits_BV: Tensor) -> tuple[None, None]:
        return None, None

    def barred(self, token_texts: Sequence[str], end_tokens: Collection[int]) -> tuple[int, ...]:
        """Return the ids of probability 0, ascending.

        Args:
            token_texts: the text of each id.
            end_tokens: ids that end a response; letters do not bar them.

        Raises:
            UserError: no response could end, or no other id is left.
        """
        return ()


@dataclass(frozen=True)
class AllowedTokens(FullVocabulary):
    """The softmax over a fixed part of the vocabulary.

        A = {v : text(v) has only `letters`, and none of `without`, and v is not in `ids`} ∪ ends
        π_A(v) = exp z[v] / Σ_{u∈A} exp z[u]   for v in A,   0 elsewhere   [I]
                                                                    (docs/algorithms.md 2.6)

    The policy bars the other ids in sampler, score, reference and heads alike (`Policy.bar`). A
    rollout stores nothing for them, as they are the same at every step. `TopK(within=…)` and its
    like choose among the allowed ids. Warm-up stages have no support and bar nothing.

    Args:
        letters: a token is allowed if its text consists of these characters; None: of any. With
            letters, tokens without text are barred, such as PAD.
        without: a token with one of these characters is barred.
        ids: ids to bar besides, also an end token.
    """

    bars = True

    letters: str | None = None
    without: str = ""
    ids: list[int] | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        if self.letters is None and not self.without and not self.ids:
            raise UserError(
                "`AllowedTokens` bars nothing: give `letters`, `without` or `ids`, or use "
                "`support: FullVocabulary`"
            )
        if self.letters is not None and not set(self.letters) - set(self.without):
            raise UserError(
                f"`AllowedTokens.letters` {self.letters!r} leaves no character beside "
                f"`without` {self.without!r}"
            )
        at_least("AllowedTokens", 0, **{f"ids[{i}]": id for i, id in enumerate(self.ids)})

    def check(self, vocabulary: int) -> None:
        if self.ids and max(self.ids) >= vocabulary:
            raise UserError(
                f"`AllowedTokens.ids` holds {max(self.ids)}, and the ids of the vocabulary are 0 "
                f"to {vocabulary - 1}"
            )

    def barred(self, token_texts: Sequence[str], end_tokens: Collection[int]) -> tuple[int, ...]:
        letters = None if self.letters is None else frozenset(self.letters)
        without, ids, ends = frozenset(self.without), frozenset(self.ids), frozenset(end_tokens)
        spelt = {
            id
            for id, text in enumerate(token_texts)
            if without.isdisjoint(text)
            and (letters is None or (text != "" and letters.issuperset(text)))
        }
        barred = set(range(len(token_texts))) - spelt - ends | ids
        if ends <= barred:
            raise UserError("`AllowedTokens.ids` holds all end tokens, so that no response ends")
        if len(barred | ends) == len(token_texts):
            raise UserError(
                f"`{self}` allows no token besides the end: no text of the {len(token_texts)} "
                "tokens consists of the allowed characters"
            )
        return tuple(sorted(barred))


class PromisingTokens(Support):
    """A support of the most probable tokens, which truncates the vocabulary.

    A subclass has these fields besides the one that `slots_name` names:

    * `from_reference`: rank by the frozen reference, an ablation: the paper's abstract speaks of
      "base model" priors, a summary of "current policy" ranks. The default, the policy at rollout
      time, is the only reading under which the ratio's support condition holds by construction [I]
      (docs/algorithms.md 2.2). Costs a second pass per token.
    * `within`: choose among these ids alone; None: among all.
    * `outside`: a token that the sampler drew from outside its stored support, as an external
      engine may, is refused; or united with the support and counted; or united, counted and left
      without loss [I] (docs/algorithms.md 2.4).
    """

    slots_name = "k"
    """The field that holds the number of slots."""

    def __post_init__(self) -> None:
        at_least(type(self).__name__, 1, **{self.slots_name: vars(self)[self.slots_name]})

    @property
    def slots(self) -> int:
        return int(vars(self)[self.slots_name])

    @property
    def fixed(self) -> FullVocabulary:
        return vars(self)["within"] or FullVocabulary()

    def check(self, vocabulary: int) -> None:
        if self.slots > vocabulary:
            raise UserError(
                f"`{type(self).__name__}.{self.slots_name}` must be at most the vocabulary size "
                f"{vocabulary}, got "
                f"{self.slots}"
            )


@dataclass(frozen=True)
class TopK(PromisingTokens):
    """The k most probable tokens (RLPT).

        P_t = {v : rank(v | s_t) <= k}   [S]; ties by (value desc, id asc); docs/algorithms.md 2.2

    Args:
        k: tokens kept per step; 8, 16 and 32 are reported for the paper [S], 16 is our default [I].
        from_reference: rank by the frozen reference instead of the policy at rollout time.
        outside: what becomes of a sampled token that its support lacks.
        within: ids among which it chooses; None: all.
    """

    slots_name = "k"

    k: int = 16
    from_reference: bool = False
    outside: Outside = "refuse"
    within: AllowedTokens | None = None

    def select(self, logits_BV: Tensor) -> tuple[Tensor, None]:
        return F.top_k(logits_BV, self.k), None


@dataclass(frozen=True)
class Nucleus(PromisingTokens):
    """The smallest set of most probable tokens with mass p, at most `max_k` of them: a support of
    varying size.

    Reported second-hand as a variant of RLPT [S] (docs/algorithms.md 2.3). The bound is ours: a
    flat distribution would otherwise store thousands of ids per step [I].

    Args:
        p: probability mass to keep, in (0, 1], after temperature.
        max_k: slots that are stored per step; those beyond the nucleus are masked, never valid ids.
        from_reference: rank by the frozen reference instead of the policy at rollout time.
        outside: what becomes of a sampled token that its support lacks.
        within: ids among which it chooses; None: all.
    """

    slots_name = "max_k"

    p: float = 0.95
    max_k: int = 32
    from_reference: bool = False
    outside: Outside = "refuse"
    within: AllowedTokens | None = None

    def __post_init__(self) -> None:
        within("Nucleus", "(0, 1]", p=self.p)
        super().__post_init__()

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        return F.nucleus(logits_BV, self.p, self.max_k)


@dataclass(frozen=True)
class MinP(PromisingTokens):
    """The tokens that are at least `ratio` times as probable as the most probable one, at most
    `max_k` of them.

    The rule by which vocabularies are pruned in arXiv:2512.23087 [S]; its threshold is not known
    [N] (docs/algorithms.md 2.3).

    Args:
        ratio: in (0, 1], after temperature.
        max_k: slots that are stored per step.
        from_reference: rank by the frozen reference instead of the policy at rollout time.
        outside: what becomes of a sampled token that its support lacks.
        within: ids among which it chooses; None: all.
    """

    slots_name = "max_k"

    ratio: float = 0.05
    max_k: int = 32
    from_reference: bool = False
    outside: Outside = "refuse"
    within: AllowedTokens | None = None

    def __post_init__(self) -> None:
        within("MinP", "(0, 1]", ratio=self.ratio)
        super().__post_init__()

    def select(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        return F.min_p(logits_BV, self.ratio, self.max_k)
