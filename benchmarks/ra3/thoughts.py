"""Thoughts as a policy samples them, and the likelihood of a line behind each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.functional.thoughts import line_likelihoods
from lightning_mpo.objective.first_tokens import OnlyTokens
from lightning_mpo.objective.supports import FullVocabulary, Support
from lightning_mpo.objective.token_ids import exact_ids, ids_containing
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.rewards.next_line import MARK, NextLineLikelihood
from lightning_mpo.rewards.reference import continuation_rows
from lightning_mpo.rewards.scoring import completions_of
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow


class Thinking(OnlyTokens):
    """The first step of a response that must think; it records how probable a thought was.

    Args:
        act: id of the line break.
        think: id of `#`, with which a comment begins.
    """

    def __init__(self, act: int, think: int) -> None:
        super().__init__([think])
        self.act, self.think = act, think
        self.chances_B: Tensor | None = None
        """P(think) where only these two tokens may begin, shape `[B]`."""

    def select(self, logits_BV: Tensor) -> tuple[Tensor, None]:
        pair_B2 = logits_BV[:, [self.act, self.think]].double()
        self.chances_B = pair_B2.softmax(-1)[:, 1]
        return super().select(logits_BV)


class ForcedThought(Support):
    """The support of an E-step where each response is a thought.

    Args:
        first: support of the first step; later ones have the whole vocabulary.
    """

    by_step = True
    some_whole = True
    slots = 1

    def __init__(self, first: Thinking) -> None:
        self.first = first

    def at(self, step: int) -> Support:
        return FullVocabulary() if step else self.first

    def select(self, logits_BV: Tensor) -> tuple[None, None]:
        return None, None


def sampled_thoughts(
    policy: CausalPolicy,
    data: CodeLines,
    rows: Sequence[PromptRow],
    guard: NextLineLikelihood,
    *,
    count: int,
    longest: int,
    seed: tuple[int, int],
) -> tuple[list[list[dict[str, Any]]], list[float]]:
    """Return thoughts in front of each line, and the probability that the policy thinks there.

    Every response is made to think. The probability is that of `#` as the first token where only
    `#` and a line break may begin.

    Args:
        policy: writes them, at temperature 1.
        data: encodes the prompts.
        rows: lines.
        guard: which thoughts can be used.
        count: thoughts of each line.
        longest: tokens of a thought.
        seed: seed of the sampling, and the position of these lines in the measurement.
    """
    act, think = exact_ids("first tokens", ["\n", MARK], policy.token_texts)
    first = Thinking(act, think)
    stop = tuple(ids_containing("stop", ["\n"], policy.token_texts))
    rollout = LocalSampler().sample(
        policy,
        data.encode(rows),
        count,
        SamplingRequest(ForcedThought(first), 1.0, longest, stop=stop),
        generator=generator_of(seed[0], Stream.CHECK, seed[1]),
    )
    assert first.chances_B is not None
    thoughts = [
        {
            "text": completion.text.partition("\n")[0],
            "ids": list(completion.token_ids),
            "usable": guard.thought_of(completion) is not None,
        }
        for completion in completions_of(rollout)
    ]
    groups = [thoughts[start : start + count] for start in range(0, len(thoughts), count)]
    return groups, first.chances_B[::count].tolist()


def likelihoods(
    base: CausalPolicy, data: CodeLines, row: PromptRow, thoughts: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return log p of a line per token, without a thought and behind each of them.

    The file before the line is computed once.

    Args:
        base: the frozen model.
        data: encodes the line.
        row: the line.
        thoughts: thoughts in front of the line, by source.

    Returns:
        `tokens`: number of tokens of the line. `likelihood`: log p(a | s), nats per token.
        `thoughts`: by source, with `gain` = log p(a | s, z) - log p(a | s), nats per token.
    """
    ids = data.encode([row]).rows[0].extra
    before, indent, blank, line = (
        list(ids[f"{name}_ids"]) for name in ("before", "indent", "blank", "line")
    )
    every = [one for group in thoughts.values() for one in group]
    betweens = [blank, *([*indent, *one["ids"], *blank] for one in every)]
    rows = len(betweens)
    rollout = continuation_rows([before] * rows, betweens, [line] * rows)
    # the tokens of the line are the last ones of each row
    starts_B = torch.tensor([len(between) for between in betweens])
    places_T = torch.arange(rollout.response_mask_BT.shape[1])
    is_line_BT = rollout.response_mask_BT & (places_T >= starts_B[:, None])
    with rollout_mode(base):
        scores = base.score(rollout, is_line_BT, temperature=1.0)
    act, *values = line_likelihoods(scores.logprobs_BT, is_line_BT).tolist()
    known = iter(values)
    measured = {
        source: [
            {"text": one["text"], "usable": one["usable"], "gain": next(known) - act}
            for one in group
        ]
        for source, group in thoughts.items()
    }
    return {"tokens": len(line), "likelihood": act, "thoughts": measured}
