"""Where the blocks of `SegmentActions` are cut: at delimiters, where the policy hesitates, or by
your own rule.

The ratio of a segment is docs/algorithms.md 3.5.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_mpo.checks import positive, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import segments as F
from lightning_mpo.objective.axes import Member
from lightning_mpo.types import Rollout


class Segmenter(Member):
    """Gives the tokens of each block a number.

    Write `segment` to cut by your own rule. A rule that says where blocks start is
    `starts_BT.long().cumsum(1)`. This one starts a block at each token that begins with a capital
    letter::

        import torch
        from lightning_mpo.objective.segmenters import Segmenter

        class Capitals(Segmenter):
            needs_texts = True

            def segment(self, rollout, entropy_BT, texts):
                starts_V = torch.tensor([text.strip()[:1].isupper() for text in texts])
                starts_BT = starts_V.to(rollout.tokens_BL.device)[rollout.responses_BT]
                return starts_BT.long().cumsum(1)
    """

    needs_entropy: bool = False
    """True asks for the policy's entropy at every response token: a forward pass where a rollout
    has one update.
    """
    needs_texts: bool = False
    """True asks for the texts of all tokens."""

    @abstractmethod
    def segment(self, rollout: Rollout, entropy_BT: Tensor | None, texts: Sequence[str]) -> Tensor:
        """Return one number per block for each response token: `segments_BT`, int64, shape `[B,
        T]`.

        The tokens of a block are neighbours: within a row a number does not come back after another
        one. What stands outside `rollout.response_mask_BT` is ignored, and a block ends where that
        mask has a gap.

        Args:
            rollout: what was sampled; `responses_BT` are its token ids.
            entropy_BT: of the policy at rollout weights, under temperature and stored support, in
                nats; None unless `needs_entropy`.
            texts: each token id as text; empty unless `needs_texts`.
        """

    def check(self, texts: Sequence[str]) -> None:
        """Refuse a vocabulary in which nothing would be cut; asked before a model is loaded, if
        `needs_texts`.
        """


@dataclass(frozen=True)
class DelimiterSegmenter(Segmenter):
    """A block ends with each token whose text contains a delimiter.

    A token is not cut: `"\\n"` also ends a block at the token `".\\n"`, and `"."` at `"3.1"`. A
    delimiter is looked for in single tokens, so that `". "` is not found where a vocabulary has
    `"."` and `" The"`; write `"."`. Two such tokens in a row end two blocks. Lines: `["\\n"]`;
    arithmetic: `["+", "-", "*", "/", "="]`; sentences: `[".", "!", "?", "\\n"]`.

    Args:
        delimiters: texts that end a block. Some may be in no token of the vocabulary, but not all
            of them.
    """

    needs_texts = True

    delimiters: Sequence[str] = ("\n",)

    def __post_init__(self) -> None:
        delimiters = self.delimiters
        if (
            isinstance(delimiters, str)
            or not delimiters
            or not all(isinstance(d, str) and d for d in delimiters)
        ):
            raise UserError(
                "`DelimiterSegmenter.delimiters` must be a list of texts, none of them empty, got "
                f"{delimiters!r}"
            )
        object.__setattr__(self, "delimiters", tuple(delimiters))

    @cached_property
    def _known_ends(self) -> dict[str, tuple[Sequence[str], Tensor]]:
        """The vocabulary of the last call, and its tokens that end a block: a search of a second at
        150,000 tokens.
        """
        return {}

    def segment(self, rollout: Rollout, entropy_BT: Tensor | None, texts: Sequence[str]) -> Tensor:
        ends_BT = self.ends(texts).to(rollout.tokens_BL.device)[rollout.responses_BT].long()
        return ends_BT.cumsum(1) - ends_BT  # a delimiter is its block's last token

    def check(self, texts: Sequence[str]) -> None:
        self.ends(texts)

    def ends(self, texts: Sequence[str]) -> Tensor:
        """Tell which token ids end a block, once per vocabulary. Shape `[V]`, bool.

        Raises:
            UserError: no token contains any of the delimiters.
        """
        known_texts, ends_V = self._known_ends.get("last", (None, torch.zeros(0)))
        if known_texts is not texts:
            ends_V = torch.tensor(
                [any(d in text for d in self.delimiters) for text in texts], dtype=torch.bool
            )
            self._known_ends["last"] = (texts, ends_V)
        if not ends_V.any():
            listed = ", ".join(map(repr, self.delimiters))
            raise UserError(
                "no token of the vocabulary contains any of `DelimiterSegmenter.delimiters` "
                f"({listed}), so nothing "
                "would be cut; a delimiter must stand within one token: give a shorter or another "
                "one"
            )
        return ends_V


@dataclass(frozen=True)
class EntropySegmenter(Segmenter):
    """A block starts where the policy hesitates: at tokens of high entropy, H_t = -Σ_v π(v | s_t)
    log π(v | s_t).

    That forks in a chain of thought are tokens of high entropy is what arXiv:2506.01939 observes
    [P, abstract]; cutting blocks there is ours [I]. Give one of the two arguments. Neither depends
    on other responses, so the blocks do not depend on the number of processes.

    Args:
        threshold: nats; a block starts at H_t >= threshold. Means the same all along a run, while
            entropy may fall.
        quantile: in [0, 1); a block starts where H_t lies above this quantile of its own response,
            so that at 0.8 about a fifth of each response's tokens start one, however sure the
            policy is.
    """

    needs_entropy = True

    threshold: float | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise UserError(
                "`EntropySegmenter` needs either `threshold` (nats) or `quantile`, "
                f"got threshold={self.threshold} and quantile={self.quantile}"
            )
        positive("EntropySegmenter", threshold=self.threshold)
        within("EntropySegmenter", "[0, 1)", quantile=self.quantile)

    def segment(self, rollout: Rollout, entropy_BT: Tensor | None, texts: Sequence[str]) -> Tensor:
        if entropy_BT is None:
            raise RuntimeError("`EntropySegmenter` needs `entropy_BT`")
        if self.threshold is not None:
            return (entropy_BT >= self.threshold).long().cumsum(1)
        return (
            F.above_quantile(entropy_BT, rollout.response_mask_BT, self.quantile or 0.0)
            .long()
            .cumsum(1)
        )


def check_segments(segmenter: Segmenter, segments_BT: object, mask_BT: Tensor) -> None:
    """Refuse what is not one number per block, by the name of the class that returned it.

    Raises:
        UserError: no tensor, another shape, no integers, or a block whose tokens are not
            neighbours.
    """
    name = f"`{type(segmenter).__name__}.segment`"
    shape = f"shape [B={mask_BT.shape[0]}, T={mask_BT.shape[1]}]"
    # a tensor of that shape
    if not isinstance(segments_BT, Tensor):
        kind = type(segments_BT).__name__
        raise UserError(
            f"{name} must return a tensor of integers of {shape}, one number per block, got {kind}"
        )
    if segments_BT.shape != mask_BT.shape:
        raise UserError(
            f"{name} must return a number per response token, {shape}, got "
            f"{list(segments_BT.shape)}"
        )
    # whole numbers
    if segments_BT.dtype == torch.bool:
        raise UserError(
            f"{name} must return int64 numbers, got bool; where True starts a block return "
            "`starts_BT.long().cumsum(1)`"
        )
    if segments_BT.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{name} must return int64 numbers, one per block, got {segments_BT.dtype}")
    # blocks whose tokens are neighbours
    place = F.find_return(segments_BT, mask_BT.to(segments_BT.device))
    if place is not None:
        row, position = place
        raise UserError(
            f"{name} gives token {position} of row {row} the number {int(segments_BT[place])}, "
            "which an earlier block of that row has: the tokens of a block must be neighbours; "
            "give each block a number of its own, such as `starts_BT.long().cumsum(1)`"
        )
