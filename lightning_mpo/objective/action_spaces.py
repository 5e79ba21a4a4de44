"""Axis "action space": over which tokens one importance ratio is taken (docs/algorithms.md 3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, one_of
from lightning_mpo.errors import UserError
from lightning_mpo.functional import actions as F
from lightning_mpo.functional.segments import number_segments
from lightning_mpo.objective.axes import Member
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.segmenters import Segmenter, check_segments
from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Experience, Rollout


@dataclass(frozen=True)
class TokenTerms:
    """Per-token quantities that exist only if each action is one token."""

    logprobs_BT: Tensor  # of the policy, nats, carries gradient
    anchor_logprobs_BT: Tensor  # of the same tokens, where the log-ratio is 0
    old_entropy_BT: Tensor | None = None  # nats, at rollout weights
    # of stored candidates under the policy, -inf in slots without one
    candidate_logprobs_BTK: Tensor | None = None
    anchor_candidate_logprobs_BTK: Tensor | None = None  # the same under the policy that sampled


@dataclass(frozen=True)
class GroupTerms:
    """What a loss needs that compares responses to one prompt against the reference."""

    reference_log_ratios_BU: Tensor  # against the reference, nats, carries gradient
    group_B: Tensor  # int64; rows of one prompt share a number


@dataclass(frozen=True)
class Actions:
    """Actions of a batch; an action stands at the position of its first token."""

    log_ratios_BU: Tensor  # nats, carries gradient
    advantages_BU: Tensor  # of the action's first token
    mask_BU: Tensor  # bool, True only where an action starts
    weights_BU: Tensor  # tokens that the action stands for; they sum to the response tokens
    tokens: TokenTerms | None = None  # where every action is a token
    factors_BU: Tensor | None = None  # multiply the actions' losses, without gradient; None: 1
    group: GroupTerms | None = None  # where the loss compares responses to a prompt


@dataclass(frozen=True)
class OffsetActions:
    """Blocks split into their offsets, for later tokens with advantages of their own."""

    actions: Actions  # [B, U·N]: the value of the block's ratio, the gradient of one offset's
    weights_BUN: Tensor  # of the offsets in the loss of their block; they sum to 1


class ActionSpace(Member):
    """Groups tokens into actions. Nothing after it knows the granularity."""

    token_level = False
    """True if every action is one token, so that probabilities of actions are those of tokens."""

    @property
    def one_per_response(self) -> bool:
        """Whether a response is one action, which has one advantage."""
        return False

    @property
    def future(self) -> int:
        """M, the future offsets whose log-probs multi-token heads must provide; 0: none."""
        return 0

    @property
    def needs_entropy(self) -> bool:
        """Whether `segment` reads entropies."""
        return False

    @property
    def needs_texts(self) -> bool:
        """Whether `segment` reads the texts of tokens."""
        return False

    @abstractmethod
    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn log-ratios `[B, T]`, or `[B, T, 1 + M]` of heads, into `(log_ratios_BU, mask_BU,
        weights_BU)`.
        """

    def segment(
        self, rollout: Rollout, entropy_BT: Tensor | None, texts: Sequence[str]
    ) -> Tensor | None:
        """Number the actions of each response, once per rollout; None where the space needs no
        numbering.

        Args:
            rollout: what was sampled.
            entropy_BT: of the policy at rollout weights, in nats; None unless `needs_entropy`.
            texts: each token id as text; empty unless `needs_texts`.
        """
        return None

    def check(self, texts: Sequence[str]) -> None:
        """Refuse a vocabulary on which the space cannot work; called before a model is loaded, if
        `needs_texts`.
        """

    def actions(
        self,
        log_ratios: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        segments_BT: Tensor | None = None,
    ) -> Actions:
        """Group token log-ratios; an action takes the advantage of its first token."""
        log_ratios_BU, mask_BU, weights_BU = self.action_log_ratios(
            log_ratios, mask_BT, segments_BT
        )
        return Actions(log_ratios_BU, advantages_BT, mask_BU, weights_BU)

    def check_group(self, group_size: int) -> None:
        """Refuse a group in which there is nothing to compare."""

    def future_advantages(self, outcome: Outcome, advantages_BT: Tensor) -> Tensor | None:
        """Return the advantage of the later tokens of the action at t, `[B, T]`; None: all tokens
        of an action have that of the first.
        """
        return None

    def offsets(
        self, log_ratios: Tensor, experience: Experience, scores: TokenScores
    ) -> OffsetActions:
        """Split actions into their offsets, where later tokens have advantages of their own.

        Args:
            log_ratios: of tokens by offset, `[B, T, 1 + M]`, nats.
            experience: the rows, with `future_advantages_BT`.
            scores: of the current policy.
        """
        raise RuntimeError(f"the tokens of `{type(self).__name__}` have one advantage")

    def token_counts(self, mask_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Return how many tokens each action stands for; that depends on the mask alone. Shape `[B,
        U]`.
        """
        return self.action_log_ratios(
            torch.zeros_like(mask_BT, dtype=torch.float32), mask_BT, segments_BT
        )[2]


@dataclass(frozen=True)
class TokenActions(ActionSpace):
    """Every token is an action: PPO, GRPO, DAPO."""

    token_level = True

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return log_ratios, mask_BT, mask_BT.float()


@dataclass(frozen=True)
class SequenceActions(ActionSpace):
    """The whole response is one action: GSPO.

    The token form gives each token the value of its response's ratio and a gradient of its own, so
    that tokens may have advantages of their own (GSPO-token, verl's form [C]; docs/algorithms.md
    3.6). With one advantage for all tokens and `SequenceMean` its gradient is that of the sequence
    form [V].

        s_t = sg(s) · π(o_t) / sg(π(o_t)),      s = exp(mean_t ell_t)

    Args:
        mean: True takes the length-normalised ratio `exp(mean_t ell_t)` (GSPO), False the product
            (RLOO's form).
        form: "sequence", or "token", which needs the mean.
    """

    mean: bool = True
    form: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        one_of("SequenceActions", ("sequence", "token"), form=self.form)
        if self.form == "token" and not self.mean:
            raise UserError(
                "`SequenceActions.form: token` needs the mean log-ratio; use `mean: true`, or "
                "`form: sequence`"
            )

    @property
    def one_per_response(self) -> bool:
        return self.form == "sequence"

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.form == "token":
            return F.sequence_token_log_ratios(log_ratios, mask_BT)
        return F.sequence_log_ratios(log_ratios, mask_BT, mean=self.mean)


@dataclass(frozen=True)
class SegmentActions(ActionSpace):
    """A block is whatever a segmenter cuts: a line, a sentence, a step between two hesitations.

        log R_j = (1/n_j) Σ_{t in block j} ell_t   (mean)   or   Σ_{t in block j} ell_t   (joint)

    A generalisation of MPO's blocks of N tokens, not the paper's (arXiv:2602.14386) [I];
    docs/algorithms.md 3.5. "mean" is GSPO's ratio, block by block: a geometric mean, biased as an
    importance ratio, whose spread falls with the block's length, so the clip range wants tuning
    anew. "joint" is the exact ratio of the block. Blocks are cut once per rollout and end at gaps
    of the response mask.

    Args:
        segmenter: where blocks are cut.
        ratio: "mean" or "joint".
        max_length: tokens; a longer block is cut into pieces of this many, the last one shorter.
            None: never.
    """

    segmenter: Segmenter
    ratio: Literal["mean", "joint"] = "mean"
    max_length: int | None = None

    def __post_init__(self) -> None:
        one_of("SegmentActions", ("mean", "joint"), ratio=self.ratio)
        at_least("SegmentActions", 1, max_length=self.max_length)

    @property
    def needs_entropy(self) -> bool:
        """Whether the segmenter reads entropies."""
        return self.segmenter.needs_entropy

    @property
    def needs_texts(self) -> bool:
        """Whether the segmenter reads the texts of tokens."""
        return self.segmenter.needs_texts

    def check(self, texts: Sequence[str]) -> None:
        self.segmenter.check(texts)

    def segment(self, rollout: Rollout, entropy_BT: Tensor | None, texts: Sequence[str]) -> Tensor:
        mask_BT = rollout.response_mask_BT
        segments_BT = self.segmenter.segment(rollout, entropy_BT, texts)
        check_segments(self.segmenter, segments_BT, mask_BT)
        return number_segments(segments_BT.to(mask_BT.device), mask_BT, max_length=self.max_length)

    def action_log_ratios(
        self, log_ratios: Tensor, mask_BT: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if segments_BT is None:
            raise RuntimeError(
                "`SegmentActions.action_log_ratios` needs the `segments_BT` that `segment` returned"
            )
        return F.segment_log_ratios(log_ratios, mask_BT, segments_BT, mean=self.ratio == "mean")
