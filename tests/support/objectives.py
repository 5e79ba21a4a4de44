"""Compositions of every axis, and one batch of experience to evaluate them on.

The policy of these tests is a table of logits `[B, T, V]` in float64.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SegmentActions, SequenceActions, TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import ExplicitWeights, FutureShare, GeometricDecay
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.segmenters import EntropySegmenter
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import BoundedTokens, ClippedRatio
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.types import Experience, Rollout, take_rows, trim
from tests.support.builders import VOCABULARY as V
from tests.support.builders import make_experience, right_padded, scores_of, seeded


def is_masked(path: Path) -> bool:
    """Whether an algorithm file is for masked models: it names a likelihood."""
    return re.search(r"^ +likelihood:(?! null)", path.read_text(), re.MULTILINE) is not None


ALGORITHMS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs" / "algorithm").glob("*.yaml")
    if not re.search("mtp|PairwiseLogistic", path.read_text()) and not is_masked(path)
)
"""Those whose loss of a response needs its own log-probs alone.

`test_mpo.py` has those of heads, `tests/objective/test_likelihoods.py` those of masked models,
`tests/objective/test_preferences.py` that of pairs.
"""
LENGTHS = [7, 3, 1, 9, 5, 4, 0, 6]
MASK = right_padded(LENGTHS, 10)
B, T = MASK.shape
SEGMENTS = (torch.rand(B, T - 1, generator=seeded(6)) < 0.4).long().cumsum(1)
SEGMENTS = torch.nn.functional.pad(SEGMENTS, (1, 0))
"""Blocks of random length, for those who take them; what cuts them is tested apart."""


def from_yaml(path: Path) -> Objective:
    """Build the objective that a configuration file names, with the command line's parser."""
    return Objective.from_file(path, max_new_tokens=12)


def compose(actions=None, surrogate=None, reduction=None, **fields) -> Objective:
    return Objective(
        support=FullVocabulary(),
        actions=actions or TokenActions(),
        advantage=GroupRelative(),
        surrogate=surrogate or ClippedRatio(),
        selection=AllTokens(),
        reduction=reduction or TokenMean(),
        **fields,
    )


KL = KLPenalty(ConstantCoefficient(0.3), "k3", "loss")
COMPOSITIONS = {
    "grpo": compose(reduction=SequenceMean()),
    "dapo": compose(surrogate=ClippedRatio(0.2, 0.28)),
    "dual": compose(surrogate=ClippedRatio(0.2, 0.2, dual=1.5)),
    "dr_grpo": compose(reduction=ConstantLength(12)),
    "gspo": compose(SequenceActions(), ClippedRatio(0.05, 0.08), SequenceMean()),
    "gspo_token": compose(SequenceActions(form="token"), ClippedRatio(0.05, 0.08), SequenceMean()),
    "sequence": compose(SequenceActions(mean=False), ClippedRatio(0.2, 0.2), SequenceMean()),
    "sliding": compose(BlockActions(FutureShare(0.3), length=3)),
    "sliding_renorm": compose(
        BlockActions(FutureShare(0.3), length=3, tail="renorm"), reduction=SequenceMean()
    ),
    "disjoint": compose(BlockActions(GeometricDecay(1.0), length=3, stride=3)),
    "disjoint_absorb": compose(
        BlockActions(GeometricDecay(0.5), length=4, stride=4, tail="absorb")
    ),
    "product": compose(
        BlockActions(ExplicitWeights([1.0, 1.0]), length=2, tail="absorb", ratio="joint")
    ),
    "segments": compose(SegmentActions(EntropySegmenter(0.5)), reduction=SequenceMean()),
    "segments_joint": compose(SegmentActions(EntropySegmenter(0.5), "joint")),
    "gmpo": compose(SequenceActions(), BoundedTokens(0.1, 0.15), SequenceMean()),
    "gmpo_blocks": compose(BlockActions(FutureShare(0.3), length=3), BoundedTokens(0.1, 0.15)),
    "dppo_tv": compose(surrogate=DivergenceMask(0.02, cap=1.2)),
    "dppo_kl": compose(
        surrogate=DivergenceMask(0.002, 0.004, divergence="kl", cap=None), reduction=SequenceMean()
    ),
    "dppo_topk": compose(surrogate=DivergenceMask(0.02, cap=1.2, top_k=4)),
    "dppo_topk_kl": compose(
        surrogate=DivergenceMask(0.01, divergence="kl", top_k=4), reduction=SequenceMean()
    ),
    "prefix": compose(PrefixActions(), PositionClip(0.1, 0.2, dual=0.3)),
    "prefix_mean": compose(
        PrefixActions(mean=True), PositionClip(0.2, 0.2, power=-0.5, dual=0.4), SequenceMean()
    ),
    "prefix_clip": compose(PrefixActions(), ClippedRatio(0.2, 0.28)),
    "forward": compose(ForwardTraceActions(3), reduction=SequenceMean()),
    "forward_all": compose(ForwardTraceActions(99), ClippedRatio(0.2, 0.2, dual=1.5)),
    "forward_dppo": compose(ForwardTraceActions(2), DivergenceMask(0.02, cap=1.2)),
    "kl": compose(reduction=SequenceMean(), terms=[KL]),
    "bonus": compose(terms=[EntropyBonus(0.1)], reduction=ConstantLength(12)),
    "everything": compose(
        BlockActions(FutureShare(), length=3),
        terms=[EntropyBonus(0.2), KL],
        reduction=SequenceMean(),
    ),
}
each = pytest.mark.parametrize("objective", COMPOSITIONS.values(), ids=COMPOSITIONS)


def table(seed: int = 0) -> Tensor:
    return torch.randn(B, T, V, generator=seeded(seed), dtype=torch.float64)


def experience(
    mask: Tensor = MASK, *, off_policy: bool = True, spread: float = 0.3, **fields
) -> Experience:
    """Return advantages per row, and old and reference log-probs near those of `table()`."""
    advantages = torch.randn(B, 1, generator=seeded(1), dtype=torch.float64).expand(B, T) * mask
    batch = make_experience(mask, advantages, **fields)
    now = scores_of(table(), batch.rollout.responses_BT, mask, batch.rollout).logprobs_BT
    noise = [spread * torch.randn(B, T, generator=seeded(s), dtype=torch.float64) for s in (2, 3)]
    old, reference = (torch.where(mask, now + n, 0.0) for n in noise)
    batch = replace(batch, rollout=recorded(batch.rollout, old))
    old_logprobs_BT = old if off_policy else None
    return replace(
        batch,
        segments_BT=SEGMENTS,
        old_logprobs_BT=old_logprobs_BT,
        reference_logprobs_BT=reference,
    )


def recorded(rollout: Rollout, old_BT: Tensor) -> Rollout:
    """Return the rollout with the 4 most probable ids of a policy near `table()`, and the sampled one in a fifth slot."""
    then = (table() + 0.3 * table(5)).log_softmax(-1)
    ids = then.topk(4).indices
    own = ids == rollout.responses_BT[..., None]
    logprobs = torch.where(own, old_BT[..., None], then.gather(2, ids))
    last = torch.where(own.any(-1), -torch.inf, old_BT)
    ids = torch.cat(
        [ids, rollout.responses_BT[..., None].masked_fill(own.any(-1, keepdim=True), 0)], -1
    )
    return replace(
        rollout,
        candidates_BTK=ids,
        candidate_logprobs_BTK=torch.cat([logprobs, last[..., None]], -1),
    )


def loss_and_gradient(
    objective: Objective, batch: Experience, parts: list[list[int]] | None = None
):
    """Return loss, gradient of the logits and metrics of a mini-batch, in one piece or in micro-batches."""
    logits = table().requires_grad_()
    parts = parts or [list(range(len(batch.valid_B)))]
    denominators = objective.denominators(batch)
    total, sums = torch.zeros(()).double(), {}
    for rows in parts:
        index = torch.tensor(rows)
        part = trim(take_rows(batch, index))
        scores = scores_of(
            logits[index][:, : part.mask_BT.shape[1]],
            part.rollout.responses_BT,
            part.mask_BT,
            part.rollout,
        )
        loss, metrics = objective.loss(part, scores, denominators)
        total = total + loss
        for name, (value, weight) in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + value.item(), old[1] + weight.item())
    return total.item(), torch.autograd.grad(total, logits)[0], sums


def row_weights(objective: Objective, mask: Tensor) -> Tensor:
    """Return what the reduction multiplies the tokens of each row with. Shape `[B, 1]`."""
    lengths = mask.sum(1, keepdim=True).double()
    rows = (lengths > 0).sum()
    if isinstance(objective.reduction, TokenMean):
        return torch.ones_like(lengths) / lengths.sum()
    if isinstance(objective.reduction, SequenceMean):
        return 1 / lengths.clamp(min=1) / rows
    return torch.ones_like(lengths) / (rows * objective.reduction.length)


ON_POLICY = {path.stem: from_yaml(path) for path in ALGORITHMS} | COMPOSITIONS


def known_probabilities(
    rollout: Rollout, logits: Tensor, b: int, t: int
) -> list[tuple[float, float]]:
    """Return the probabilities of the candidates of one token, then and now."""
    table = logits.softmax(0).tolist()
    pairs = zip(
        rollout.candidates_BTK[b, t].tolist(),
        rollout.candidate_logprobs_BTK[b, t].tolist(),
        strict=True,
    )
    return [(math.exp(logprob), table[i]) for i, logprob in pairs if logprob > -math.inf]
