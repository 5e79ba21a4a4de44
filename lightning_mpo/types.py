"""What flows through one step, as frozen dataclasses of plain tensors.

Letters, used in names (`advantages_BT`), docstrings and checks alike:

=====  =======================================================================
**P**  prompts of a rollout
**G**  completions per prompt
**B**  rows of a batch, B = P·G in a rollout (group-major: a group's rows are neighbours)
**S**  prompt tokens, padded on the left
**T**  response tokens, padded on the right
**L**  S + T
**V**  vocabulary
**K**  support size: the promising tokens of one step
**N**  block length in tokens (the papers write K)
**M**  N - 1, the future offsets of a block that multi-token heads predict
**U**  actions of a response; U = T, an action stands at its first token
**C**  noised copies of a row, for a masked language model
**D**  hidden size
=====  =======================================================================

`mask` tensors are bool and carried from the sampler on; nothing derives them from token values, as
pad may equal eos. Log-probabilities are natural (nats) and float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

NEVER = 2**31 - 1
"""The step of a token that no step of a sampler revealed: an end token behind an early end."""

Batch = TypeVar("Batch", "Rollout", "Experience")


class Finish(IntEnum):
    """Why a response ended: it sampled the end token, or it ran into `max_new_tokens`."""

    STOP = 0
    LENGTH = 1


@dataclass(frozen=True)
class PromptRow:
    """One row of a data set: the prompt, the right answer, and a solution to imitate in a
    supervised warm-up.

    `messages` is the chat that the response continues; empty: `prompt` alone is the user's message.
    With messages, `prompt` is the text of the last one.
    """

    prompt: str
    target: str
    solution: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    where: str = field(default="", compare=False)
    """Place of the row in its file, for messages."""
    thinking: bool = field(default=False, compare=False)
    """True for an encoded row whose rendered prompt ends by opening a thought (`<think>`)."""
    opening: str = ""
    """The beginning of the response, which is given: it ends the prompt and is never sampled."""


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows to validate on, which share no prompt."""

    train: Sequence[PromptRow]
    validation: Sequence[PromptRow]


@dataclass(frozen=True)
class PromptBatch:
    """Encoded prompts with the rows they came from."""

    input_ids_PS: Tensor  # int64, padded on the left
    attention_mask_PS: Tensor  # bool
    rows: tuple[PromptRow, ...]
    first: int = 0  # number of the first row among those of an evaluation

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, exactly as sampled: token in, token out.

    `behaviour_logprobs_BT` are of the distribution that was sampled from: temperature and support
    applied.
    """

    tokens_BL: Tensor  # int64; prompts padded left, responses right
    attention_mask_BL: Tensor  # bool
    response_mask_BT: Tensor  # bool; True up to and including the end token
    group_B: Tensor  # int64; rows of one prompt share a number
    behaviour_logprobs_BT: Tensor  # float32 nats, 0 where masked
    finish_B: Tensor  # int64, a `Finish`
    support_BTK: Tensor | None = None  # int32 token ids, None for the full vocabulary
    support_mask_BTK: Tensor | None = None  # bool; None when every slot counts
    kept_mass_BT: Tensor | None = None  # probability of the support under the full softmax
    # int32; the most probable ids of each step, where a surrogate compares them
    candidates_BTK: Tensor | None = None
    # float32 nats, of the distribution that was sampled from
    candidate_logprobs_BTK: Tensor | None = None
    # bool; sampled tokens that were missing from the recorded support and were added to it
    outside_BT: Tensor | None = None
    # int32; step at which a masked policy revealed each token, or `NEVER`
    reveal_BT: Tensor | None = None
    reveal_entropy_BT: Tensor | None = None  # nats; of the distribution of each token's draw
    # bool; tokens that a masked policy sees as MASK, in each noised copy of the row
    hidden_BCL: Tensor | None = None
    copy_weights_BCT: Tensor | None = None  # float32; factors of the log-probs under each copy
    texts: tuple[str, ...] = ()
    rows: tuple[PromptRow, ...] = ()

    @property
    def prompt_length(self) -> int:
        """S: the width of the prompt columns in `tokens_BL`."""
        return self.tokens_BL.shape[1] - self.response_mask_BT.shape[1]

    @property
    def responses_BT(self) -> Tensor:
        """The response columns of `tokens_BL`."""
        return self.tokens_BL[:, self.prompt_length :]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that its updates need, computed once, at rollout weights."""

    rollout: Rollout
    rewards_B: Tensor  # float32
    valid_B: Tensor  # bool; False: advantage 0, in no denominator
    advantages_BT: Tensor  # float32
    token_weights_BT: Tensor  # float32; 0 = not scored
    segments_BT: Tensor | None = None  # int64; tokens of one action share a number
    # what ratios are against; None: one update per rollout, old = new.detach()
    old_logprobs_BT: Tensor | None = None
    old_future_BTM: Tensor | None = None  # log q_n(o_{t+n} | h_t) of multi-token heads, n = 1 … M
    reference_logprobs_BT: Tensor | None = None
    reference_logits_BTK: Tensor | None = None
    values_BT: Tensor | None = None  # of the critic, at rollout weights
    returns_BT: Tensor | None = None  # what the critic is fitted to
    # nats, at rollout weights, where the surrogate asks for it
    old_entropy_BT: Tensor | None = None
    future_advantages_BT: Tensor | None = None  # of the later tokens of a block, if not the first's
    correction_BT: Tensor | None = None  # weights for a sampler that differs from the trainer

    @property
    def mask_BT(self) -> Tensor:
        """Response tokens that carry loss: sampled, in a valid row, and selected."""
        return self.whole_mask_BT & (self.token_weights_BT > 0)

    @property
    def whole_mask_BT(self) -> Tensor:
        """Response tokens of valid rows, selected or not."""
        return self.rollout.response_mask_BT & self.valid_B[:, None]


def take_rows(batch: Batch, index_B: Tensor, *, texts: bool = False) -> Batch:
    """Select rows of every field of a `Rollout` or `Experience`; texts and prompt rows are left
    behind unless `texts`.

    Example:
        >>> rollout = Rollout(*(torch.arange(6).view(3, 2) for _ in range(3)), torch.arange(3),
        ...                   torch.zeros(3, 2), torch.zeros(3))
        >>> take_rows(rollout, torch.tensor([2])).tokens_BL
        tensor([[4, 5]])
    """
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value[index_B]
        elif isinstance(value, Rollout):
            changes[item.name] = take_rows(value, index_B, texts=texts)
        elif isinstance(value, tuple):
            changes[item.name] = (
                tuple(value[b] for b in index_B.tolist()) if texts and value else ()
            )
    return replace(batch, **changes)


def trim_rollout(rollout: Rollout) -> Rollout:
    """Cut the columns that no row uses: prompt padding on the left, response padding on the
    right.
    """
    first, S, T = _extent(rollout)
    return replace(rollout, **_cut(rollout, first, S, T))


def trim(experience: Experience) -> Experience:
    """Cut the columns of an experience that no row uses."""
    first, S, T = _extent(experience.rollout)
    rollout = replace(experience.rollout, **_cut(experience.rollout, first, S, T))
    return replace(experience, **_cut(experience, first, S, T) | {"rollout": rollout})


def _extent(rollout: Rollout) -> tuple[int, int, int]:
    S = rollout.prompt_length
    first = int(rollout.attention_mask_BL[:, :S].any(0).int().argmax()) if S else 0
    # a gap of the mask does not end a response, and a masked policy attends behind its end
    seen_BT = rollout.response_mask_BT | rollout.attention_mask_BL[:, S:]
    used = seen_BT.any(0).nonzero()
    return first, S, int(used.max()) + 1 if len(used) else 1


def _cut(batch: Rollout | Experience, first: int, S: int, T: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value, suffix = getattr(batch, item.name), item.name.rsplit("_", 1)[-1]
        if isinstance(value, Tensor) and suffix == "BL":
            changes[item.name] = value[:, first : S + T]
        elif isinstance(value, Tensor) and suffix == "BCL":
            changes[item.name] = value[..., first : S + T]
        elif isinstance(value, Tensor) and suffix == "BCT":
            changes[item.name] = value[..., :T]
        elif isinstance(value, Tensor) and suffix.startswith("BT"):
            changes[item.name] = value[:, :T]
    return changes


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a `Rollout` or `Experience`."""
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device)
        elif isinstance(value, Rollout):
            changes[item.name] = to_device(value, device)
    return replace(batch, **changes)
