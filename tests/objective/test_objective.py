"""The composed loss: identities on-policy, naive loops off-policy, and what must change nothing.

The policy of these tests is a table of logits `[B, T, V]` in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k1, k2, k3
from lightning_mpo.objective.action_spaces import (
    BlockActions,
    ExplicitWeights,
    FutureShare,
    GeometricDecay,
    SegmentActions,
    SequenceActions,
    TokenActions,
)
from lightning_mpo.objective.advantages import GroupRelative, LeaveOneOut
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.segmenters import EntropySegmenter
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.objective.surrogates import (
    AsymmetricRatio,
    BoundedTokens,
    ClippedRatio,
    ClippedWeight,
    DivergenceMask,
    PolicyGradient,
    Surrogate,
)
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.types import Experience, Rollout, take_rows, trim
from tests.support.builders import VOCABULARY as V
from tests.support.builders import make_experience, relative_error, right_padded, scores_of, seeded

ALGORITHMS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs" / "algorithm").glob("*.yaml")
    if "mtp" not in path.read_text()
)
"""Those whose loss needs the token's own log-probs alone; `test_mpo.py` has the others."""
LENGTHS = [7, 3, 1, 9, 5, 4, 0, 6]
MASK = right_padded(LENGTHS, 10)
B, T = MASK.shape
SEGMENTS = (torch.rand(B, T - 1, generator=seeded(6)) < 0.4).long().cumsum(1)
SEGMENTS = torch.nn.functional.pad(SEGMENTS, (1, 0))
"""Blocks of random length, for those who take them; what cuts them is tested apart."""


def from_yaml(path: Path) -> Objective:
    """Build the objective that a configuration file names, with the command line's parser."""
    content = OmegaConf.create(
        yaml.safe_load(path.read_text()) | {"rollout": {"max_new_tokens": 12}}
    )
    options = OmegaConf.to_container(content, resolve=True)["model"]["init_args"]["objective"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    return parser.instantiate_classes(parser.parse_object({"objective": options})).objective


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
    "kl": compose(reduction=SequenceMean(), kl=KL),
    "bonus": compose(bonus=EntropyBonus(0.1), reduction=ConstantLength(12)),
    "everything": compose(
        BlockActions(FutureShare(), length=3),
        kl=KL,
        bonus=EntropyBonus(0.2),
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


# --- on-policy ------------------------------------------------------------------------------------------------------


def token_coefficients(objective: Objective, mask: Tensor) -> Tensor:
    """Return by how much each token's score counts on-policy, before the reduction (docs/algorithms.md 3.4)."""
    actions, coefficients = objective.actions, mask.double()
    for b, length in enumerate(mask.sum(1).tolist()):
        if isinstance(actions, SequenceActions):
            coefficients[b, :length] = 1.0 if actions.mean else float(length)
        elif isinstance(actions, SegmentActions):
            ids = SEGMENTS[b, :length].tolist()
            coefficients[b, :length] = torch.tensor(
                [1.0 if actions.ratio == "mean" else ids.count(i) for i in ids]
            )
        elif isinstance(actions, BlockActions):
            beta = actions.weights_N
            renorm = actions.tail == "renorm" or (actions.tail is None and actions.stride > 1)
            coefficients[b] = 0
            for start in range(0, length, actions.stride):
                alive = min(actions.length, length - start)
                stands_for = min(actions.stride, length - start)
                scale = sum(beta) / sum(beta[:alive]) if renorm else 1.0
                for n in range(alive):
                    coefficients[b, start + n] += stands_for * scale * beta[n]
    return coefficients


def row_weights(objective: Objective, mask: Tensor) -> Tensor:
    """Return what the reduction multiplies the tokens of each row with. Shape `[B, 1]`."""
    lengths = mask.sum(1, keepdim=True).double()
    rows = (lengths > 0).sum()
    if isinstance(objective.reduction, TokenMean):
        return torch.ones_like(lengths) / lengths.sum()
    if isinstance(objective.reduction, SequenceMean):
        return 1 / lengths.clamp(min=1) / rows
    return torch.ones_like(lengths) / (rows * objective.reduction.length)


def on_policy_gradient(objective: Objective, batch: Experience) -> Tensor:
    """Return the gradient of the objective's loss where its support holds the whole vocabulary."""
    support = TopK(V) if isinstance(objective.support, TopK) else objective.support
    objective = replace(objective, support=support)
    logits = table().requires_grad_()
    tokens, mask = batch.rollout.responses_BT, batch.mask_BT
    support_NK, slots_NK = support.select(logits.detach().flatten(0, 1))
    if support_NK is None:
        scores = scores_of(logits, tokens, mask, batch.rollout)
    else:
        assert slots_NK is None
        ids = support_NK.long().view(B, T, -1)
        chosen = (ids == tokens[..., None]).int().argmax(-1)
        scores = scores_of(logits.gather(2, ids), chosen, mask)
    scores = replace(scores, entropy_BT=scores.entropy_BT.detach())
    batch = replace(batch, old_logprobs_BT=None, reference_logprobs_BT=scores.logprobs_BT.detach())
    loss, _ = objective.loss(batch, scores, objective.denominators(batch))
    return torch.autograd.grad(loss, logits)[0]


def reinforce_gradient(coefficients: Tensor, batch: Experience) -> Tensor:
    logits = table().requires_grad_()
    logprobs = scores_of(
        logits, batch.rollout.responses_BT, batch.mask_BT, batch.rollout
    ).logprobs_BT
    return torch.autograd.grad(-(coefficients * batch.advantages_BT * logprobs).sum(), logits)[0]


ON_POLICY = {path.stem: from_yaml(path) for path in ALGORITHMS} | COMPOSITIONS


@pytest.mark.parametrize("objective", ON_POLICY.values(), ids=ON_POLICY)
def test_on_policy_every_algorithm_is_reinforce_with_its_own_reduction(objective):
    """The universal identity (docs/algorithms.md 16.6): ratio 1, whole vocabulary, reference = policy."""
    batch = experience(off_policy=False)
    coefficients = token_coefficients(objective, MASK) * row_weights(objective, MASK)
    error = relative_error(
        on_policy_gradient(objective, batch), reinforce_gradient(coefficients, batch)
    )
    assert error < 1e-6


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_on_policy_interior_tokens_learn_as_in_the_token_method(path):
    """Only the first N - 1 tokens of sliding blocks differ; all other algorithms equal token actions everywhere."""
    objective = from_yaml(path)
    actions = objective.actions
    first = actions.length - 1 if isinstance(actions, BlockActions) and actions.stride == 1 else 0
    batch = experience(off_policy=False)
    own = on_policy_gradient(objective, batch)
    tokens = on_policy_gradient(replace(objective, actions=TokenActions()), batch)
    if (
        isinstance(actions, SequenceActions) and not actions.mean
    ):  # a sum of log-ratios counts every token in full
        tokens = tokens * MASK.sum(1)[:, None, None]
    assert relative_error(own[:, first:], tokens[:, first:]) < 1e-6
    if first:  # beta_0, beta_0 + beta_1, …
        for t in range(first):
            assert relative_error(own[:, t], tokens[:, t] * sum(actions.weights_N[: t + 1])) < 1e-6


def test_algorithms_with_one_reduction_agree_on_policy():
    """grpo = gspo, dr_grpo proportional to dapo (docs/algorithms.md 16.4, invariant 2)."""
    batch = experience(off_policy=False)
    by_name = {path.stem: on_policy_gradient(from_yaml(path), batch) for path in ALGORITHMS}
    assert relative_error(by_name["gspo"], by_name["grpo"]) < 1e-6
    assert relative_error(by_name["gspo_token"], by_name["grpo"]) < 1e-6
    assert relative_error(by_name["rlpt"], by_name["grpo"]) < 1e-6
    ratio = MASK.sum() / (12 * (MASK.sum(1) > 0).sum())  # both take the same advantages here
    assert relative_error(by_name["dr_grpo"], by_name["dapo"] * ratio) < 1e-6


@each
def test_old_logprobs_equal_to_the_new_ones_are_the_same_as_none(objective):
    batch = experience(off_policy=False)
    now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    without, given = (
        loss_and_gradient(objective, batch),
        loss_and_gradient(objective, replace(batch, old_logprobs_BT=now)),
    )
    assert given[0] == pytest.approx(without[0])
    assert relative_error(given[1], without[1]) < 1e-12
    assert (
        next(value for name, (value, _) in given[2].items() if name.endswith("clip_fraction")) == 0
    )


# --- off-policy, against loops --------------------------------------------------------------------------------------


def token_loss(
    ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """-min(r·A, clip(r)·A), and min(that, -c·A) where A < 0."""
    loss = -min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


def divergence_loss(
    surrogate: DivergenceMask,
    now: Tensor,
    then: Tensor,
    advantage: Tensor,
    known: list[tuple[float, float]],
) -> Tensor:
    """What a token costs in DPPO, from docs/algorithms.md 5.6; `known` are probabilities of candidates, then and now."""
    p, q = now.exp().item(), then.exp().item()
    buckets = known if surrogate.top_k else [(q, p)]
    buckets = [*buckets, (1 - sum(old for old, _ in buckets), 1 - sum(new for _, new in buckets))]
    if surrogate.divergence == "tv":
        distance = sum(abs(old - new) for old, new in buckets) / 2
    else:
        distance = sum(old * math.log(old / new) for old, new in buckets)
    rising = advantage > 0 and p > q and distance > (surrogate.delta_up or surrogate.delta)
    falling = advantage < 0 and p < q and distance > surrogate.delta
    weight = 0.0 if rising or falling else min(p / q, surrogate.cap or math.inf)
    return -weight * advantage * now


def bounded(surrogate: Surrogate, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """What is left of a token's log-ratio before it is grouped."""
    if not isinstance(surrogate, BoundedTokens):
        return log_ratio
    return (
        min(log_ratio, torch.tensor(surrogate.high))
        if advantage > 0
        else max(log_ratio, torch.tensor(-surrogate.low))
    )


def surrogate_loss(surrogate: Surrogate, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """What an action costs, from the equations of docs/algorithms.md 5.1 to 5.4."""
    if isinstance(surrogate, BoundedTokens):
        return -log_ratio.exp() * advantage
    if isinstance(surrogate, ClippedRatio):
        return token_loss(log_ratio.exp(), advantage, surrogate.low, surrogate.high, surrogate.dual)
    ratio, weight = log_ratio.exp().item(), 1.0
    if isinstance(surrogate, ClippedWeight):
        weight = min(max(ratio, 1 - surrogate.low), 1 + surrogate.high)
    elif isinstance(surrogate, AsymmetricRatio) and advantage < 0:
        weight = min(ratio, surrogate.cap_negative) if ratio >= 1 - surrogate.low else 0.0
    elif isinstance(surrogate, AsymmetricRatio):
        weight = min(1 / ratio, surrogate.cap_positive) if ratio <= 1 + surrogate.high else 0.0
    else:
        assert isinstance(surrogate, PolicyGradient)
    return -weight * advantage * log_ratio


def naive_actions(actions, ell: list[Tensor], ids: list[int]) -> list[tuple[Tensor, int, int]]:
    """Return (log-ratio, start, tokens it stands for) of each action of one response, as in docs/algorithms.md 3.2 to 3.6."""
    if not ell:
        return []
    if isinstance(actions, TokenActions):
        return [(x, t, 1) for t, x in enumerate(ell)]
    if isinstance(actions, SequenceActions):
        total = sum(ell)
        if actions.form == "token":  # the value of all, the gradient of one
            return [(x - x.detach() + total.detach() / len(ell), t, 1) for t, x in enumerate(ell)]
        return [(total / len(ell) if actions.mean else total, 0, len(ell))]
    if isinstance(actions, SegmentActions):
        blocks = [[t for t, i in enumerate(ids) if i == j] for j in sorted(set(ids))]
        sums = [
            sum(ell[t] for t in block) / (len(block) if actions.ratio == "mean" else 1)
            for block in blocks
        ]
        return [(value, block[0], len(block)) for value, block in zip(sums, blocks, strict=True)]
    found, beta = [], actions.weights_N
    renorm = actions.tail == "renorm" or (actions.tail is None and actions.stride > 1)
    for start in range(0, len(ell), actions.stride):
        window = ell[start : start + actions.length]
        value = sum(b * x for b, x in zip(beta, window, strict=False))
        if renorm:
            value = value * sum(beta) / sum(beta[: len(window)])
        found.append((value, start, min(actions.stride, len(ell) - start)))
    return found


def naive_reduce(reduction, rows: list[list[tuple[Tensor, int]]]) -> Tensor:
    """Reduce (value, weight) by row."""
    rows = [row for row in rows if row]
    if isinstance(reduction, SequenceMean):
        return sum(sum(x * w for x, w in row) / sum(w for _, w in row) for row in rows) / len(rows)
    total = sum(x * w for row in rows for x, w in row)
    if isinstance(reduction, TokenMean):
        return total / sum(w for row in rows for _, w in row)
    return total / (len(rows) * reduction.length)


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


def naive_loss(objective: Objective, batch: Experience, logits: Tensor) -> Tensor:
    """Return the loss of a mini-batch, one token at a time."""
    losses, penalties, entropies = [], [], []
    for b in range(len(logits)):
        tokens = batch.rollout.responses_BT[b]
        where = [t for t in range(T) if batch.mask_BT[b, t]]
        now = {t: logits[b, t].log_softmax(0)[tokens[t]] for t in where}
        old, gain = batch.old_logprobs_BT[b], batch.advantages_BT[b]
        ell = [bounded(objective.surrogate, now[t] - old[t], gain[t]) for t in where]
        found = naive_actions(objective.actions, ell, SEGMENTS[b, where].tolist())
        if isinstance(objective.surrogate, DivergenceMask):
            known = [known_probabilities(batch.rollout, logits[b, t].detach(), b, t) for t in where]
            terms = [
                divergence_loss(objective.surrogate, now[t], old[t], gain[t], k)
                for t, k in zip(where, known, strict=False)
            ]
            losses.append([(term, 1) for term in terms])
        else:
            losses.append(
                [(surrogate_loss(objective.surrogate, x, gain[where[s]]), w) for x, s, w in found]
            )
        if objective.kl_in_loss:
            gaps = [batch.reference_logprobs_BT[b, t] - now[t] for t in where]
            penalties.append([(gap.exp() - gap - 1, 1) for gap in gaps])
        if objective.bonus is not None:
            tables = [logits[b, t].log_softmax(0) for t in where]
            entropies.append([(-(row.exp() * row).sum(), 1) for row in tables])
    loss = naive_reduce(objective.reduction, losses)
    if objective.kl_in_loss:
        loss = loss + objective.kl.controller.coefficient * naive_reduce(
            objective.reduction, penalties
        )
    if objective.bonus is not None:
        loss = loss - objective.bonus.coef * naive_reduce(objective.reduction, entropies)
    return loss


OFF_POLICY = COMPOSITIONS | {f"configs/{path.stem}": from_yaml(path) for path in ALGORITHMS}


@pytest.mark.parametrize("objective", OFF_POLICY.values(), ids=OFF_POLICY)
def test_off_policy_loss_and_gradient_equal_a_loop_over_tokens(objective):
    batch = experience()
    logits = table().requires_grad_()
    expected = naive_loss(objective, batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss, gradient, metrics = loss_and_gradient(objective, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, expected_gradient) < 1e-6
    divergence = (
        isinstance(objective.surrogate, DivergenceMask) and objective.surrogate.delta > 0.02
    )  # never reached here
    if type(objective.surrogate).clipped is not Surrogate.clipped and not divergence:
        assert (
            0 < metrics["ratio/clip_fraction"][0] < metrics["ratio/clip_fraction"][1]
        )  # both branches were there


def test_the_token_form_of_gspo_has_the_gradient_of_the_sequence_form_until_tokens_differ():
    """Off-policy, both clips reached: docs/algorithms.md 3.6 [V]."""
    batch = experience()
    sequence, token = COMPOSITIONS["gspo"], COMPOSITIONS["gspo_token"]
    (loss, gradient, _), (expected_loss, expected, _) = (
        loss_and_gradient(form, batch) for form in (token, sequence)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(gradient, expected) < 1e-6
    signs_T = torch.ones(T).index_fill(0, torch.arange(1, T, 2), -1.0)
    differing = replace(batch, advantages_BT=batch.advantages_BT * signs_T)
    assert (
        relative_error(
            loss_and_gradient(token, differing)[1], loss_and_gradient(sequence, differing)[1]
        )
        > 0.1
    )


# --- what must change nothing ---------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "parts", [[[0, 1, 2], [3, 4, 5, 6, 7]], [[b] for b in range(B)], [[6], [7, 0, 3], [1, 2, 5, 4]]]
)
def test_micro_batches_add_up_to_the_mini_batch(objective, parts):
    whole, split = (loss_and_gradient(objective, experience(), p) for p in (None, parts))
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    assert relative_error(split[1], whole[1]) < 1e-6
    for name, (value, weight) in whole[2].items():
        if not name.startswith("loss/"):
            assert split[2][name] == pytest.approx((value, weight), rel=1e-5, abs=1e-9), name


@each
def test_denominators_add_up_over_parts(objective):
    batch = experience()
    parts = [
        objective.denominators(take_rows(batch, torch.tensor(rows)))
        for rows in ([0, 3], [1, 2, 4, 5, 6, 7])
    ]
    total, whole = parts[0] + parts[1], objective.denominators(batch)
    torch.testing.assert_close(total.actions, whole.actions)
    torch.testing.assert_close(total.tokens, whole.tokens)


@each
def test_the_order_of_rows_and_columns_of_padding_change_nothing(objective):
    batch = experience()
    order = torch.randperm(B, generator=seeded(4))
    expected, moved = (loss_and_gradient(objective, batch, p) for p in (None, [order.tolist()]))
    assert moved[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_error(moved[1], expected[1]) < 1e-6
    logits = table().requires_grad_()  # untrimmed: T has a column that no row uses
    loss, _ = objective.loss(
        batch,
        scores_of(logits, batch.rollout.responses_BT, MASK, batch.rollout),
        objective.denominators(batch),
    )
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)


@each
@pytest.mark.parametrize("how", ["invalid", "deselected", "empty"])
def test_rows_that_do_not_count_change_nothing_whatever_is_in_them(objective, how):
    counted = torch.tensor([True, True, False, True, True, False, True, True])
    rows = counted.nonzero()[:, 0].tolist()
    whole = experience()
    poison = torch.where(counted[:, None], 0.0, torch.tensor(float("nan"), dtype=torch.float64))
    fields = {
        "old_logprobs_BT": whole.old_logprobs_BT + poison,
        "reference_logprobs_BT": whole.reference_logprobs_BT + poison,
    }
    if how == "invalid":
        batch = replace(whole, valid_B=counted, **fields)
    elif how == "deselected":
        batch = replace(whole, token_weights_BT=whole.token_weights_BT * counted[:, None], **fields)
    else:
        rollout = replace(whole.rollout, response_mask_BT=MASK & counted[:, None])
        batch = replace(whole, rollout=rollout, **fields)
    got = loss_and_gradient(objective, batch)
    logits = table()[rows].requires_grad_()
    part = take_rows(whole, torch.tensor(rows))
    scores = scores_of(logits, part.rollout.responses_BT, part.mask_BT, part.rollout)
    loss, metrics = objective.loss(part, scores, objective.denominators(part))
    (gradient,) = torch.autograd.grad(loss, logits)
    for name, (value, weight) in metrics.items():
        assert got[2][name] == pytest.approx((value.item(), weight.item()), rel=1e-5, abs=1e-9), (
            name
        )
    assert got[0] == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(got[1][rows], gradient) < 1e-6
    assert not got[1][~counted].any()


@each
def test_the_scale_of_the_token_weights_changes_no_mean(objective):
    if isinstance(objective.reduction, ConstantLength):
        objective = replace(objective, reduction=TokenMean())
    batch = experience()
    expected = loss_and_gradient(objective, batch)
    halved = loss_and_gradient(
        objective, replace(batch, token_weights_BT=batch.token_weights_BT / 2)
    )
    assert halved[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_error(halved[1], expected[1]) < 1e-6


@each
def test_a_batch_without_any_action_has_no_loss_and_no_gradient(objective):
    loss, gradient, _ = loss_and_gradient(
        objective, replace(experience(), valid_B=torch.zeros(B, dtype=torch.bool))
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    "surrogate", [DivergenceMask(0.02), DivergenceMask(0.02, top_k=4)], ids=["binary", "top"]
)
def test_tokens_beyond_the_trust_region_stay_in_the_denominator(surrogate):
    """docs/algorithms.md 16.3, invariant 10: those that are left keep the weight that they had without a mask."""
    batch = experience()
    masked, free = (
        loss_and_gradient(compose(surrogate=s), batch) for s in (surrogate, DivergenceMask(1e9))
    )
    stopped = ~masked[1].any(-1) & MASK
    assert 0 < stopped.sum() < MASK.sum()
    assert torch.equal(masked[1][~stopped], free[1][~stopped])


@pytest.mark.parametrize("top_k", [None, 4])
def test_metrics_of_a_trust_region_are_what_they_say(top_k):
    surrogate, batch = DivergenceMask(0.02, cap=1.2, top_k=top_k), experience()
    metrics = {
        name: value / weight
        for name, (value, weight) in loss_and_gradient(compose(surrogate=surrogate), batch)[
            2
        ].items()
    }
    now = scores_of(table(), batch.rollout.responses_BT, MASK).logprobs_BT
    stopped: dict[bool, list[bool]] = {True: [], False: []}
    distances, capped = [], []
    for b, t in MASK.nonzero().tolist():
        p, q = now[b, t].exp().item(), batch.old_logprobs_BT[b, t].exp().item()
        pairs = known_probabilities(batch.rollout, table()[b, t], b, t) if top_k else [(q, p)]
        rest = [1 - sum(side) for side in zip(*pairs, strict=True)]
        distances.append(sum(abs(old - new) for old, new in [*pairs, rest]) / 2)
        good = batch.advantages_BT[b, t].item() > 0
        stopped[good].append(distances[-1] > 0.02 and (p > q) == good)
        capped.append(p / q > 1.2)
    assert metrics["trust/masked_good"] == pytest.approx(sum(stopped[True]) / len(stopped[True]))
    assert metrics["trust/masked_bad"] == pytest.approx(sum(stopped[False]) / len(stopped[False]))
    assert 0 < sum(stopped[True]) < len(stopped[True])
    assert 0 < sum(stopped[False]) < len(stopped[False])
    assert metrics["trust/divergence"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert metrics["trust/capped"] == pytest.approx(sum(capped) / len(capped))
    uncapped = loss_and_gradient(
        compose(surrogate=DivergenceMask(0.02, cap=None, top_k=top_k)), batch
    )[2]
    assert "trust/capped" not in uncapped
    assert not any(name.startswith("trust/") for name in loss_and_gradient(compose(), batch)[2])


# --- KL, entropy, metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(), ConstantLength(12)], ids=lambda r: type(r).__name__
)
def test_the_kl_penalty_adds_its_gradient_through_the_same_reduction(estimator, reduction):
    batch = experience()
    plain = compose(reduction=reduction)
    penalised = replace(plain, kl=KLPenalty(ConstantCoefficient(0.7), estimator, "loss"))
    with_kl, without = (loss_and_gradient(o, batch) for o in (penalised, plain))
    logits = table().requires_grad_()
    now = scores_of(logits, batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    gap = now - batch.reference_logprobs_BT
    naive = gap.square() / 2 if estimator == "k2" else (-gap).exp() + gap - 1
    expected = 0.7 * (naive * row_weights(plain, MASK) * MASK).sum()
    assert with_kl[0] - without[0] == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(with_kl[1] - without[1], torch.autograd.grad(expected, logits)[0]) < 1e-6


def test_kl_in_the_reward_or_merely_watched_adds_nothing_to_the_loss():
    batch = experience()
    plain = compose()
    in_reward = replace(plain, kl=KLPenalty(ConstantCoefficient(0.7), "k1", "reward"))
    assert not in_reward.kl_in_loss
    assert COMPOSITIONS["kl"].kl_in_loss
    assert loss_and_gradient(in_reward, batch)[0] == loss_and_gradient(plain, batch)[0]
    assert torch.equal(loss_and_gradient(in_reward, batch)[1], loss_and_gradient(plain, batch)[1])
    bare = replace(batch, reference_logprobs_BT=None)
    assert loss_and_gradient(plain, bare)[0] == loss_and_gradient(plain, batch)[0]


def test_the_entropy_bonus_adds_the_entropys_gradient():
    batch, coefficient = experience(), 0.4
    plain = compose(reduction=SequenceMean())
    with_bonus = loss_and_gradient(replace(plain, bonus=EntropyBonus(coefficient)), batch)
    without = loss_and_gradient(plain, batch)
    logits = table().requires_grad_()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    expected = -coefficient * (entropy * row_weights(plain, MASK) * MASK).sum()
    assert with_bonus[0] - without[0] == pytest.approx(expected.item(), rel=1e-6)
    assert (
        relative_error(with_bonus[1] - without[1], torch.autograd.grad(expected, logits)[0]) < 1e-6
    )
    zero = loss_and_gradient(replace(plain, bonus=EntropyBonus(0.0)), batch)
    assert zero[0] == without[0]


def test_metrics_are_what_they_say():
    batch, objective = experience(), compose(BlockActions(GeometricDecay(1.0), length=3, stride=3))
    metrics = {
        name: value / weight
        for name, (value, weight) in loss_and_gradient(objective, batch)[2].items()
    }
    scores = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout)
    ell = [(scores.logprobs_BT - batch.old_logprobs_BT)[b][MASK[b]].tolist() for b in range(B)]
    blocks = [
        (
            sum(row[s : s + 3]) / len(row[s : s + 3]),
            batch.advantages_BT[b, 0].item(),
            len(row[s : s + 3]),
        )
        for b, row in enumerate(ell)
        for s in range(0, len(row), 3)
    ]
    n, tokens = len(blocks), int(MASK.sum())
    exp = [torch.tensor(x).exp().item() for x, _, _ in blocks]
    clipped = [
        (r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, (_, a, _) in zip(exp, blocks, strict=True)
    ]
    assert metrics["ratio/mean"] == pytest.approx(sum(exp) / n, rel=1e-5)
    assert metrics["ratio/abs_log"] == pytest.approx(
        sum(abs(x) for x, _, _ in blocks) / n, rel=1e-5
    )
    assert metrics["ratio/tokens_per_action"] == pytest.approx(tokens / n)
    assert metrics["ratio/clip_fraction"] == pytest.approx(sum(clipped) / n)
    assert 0 < sum(clipped) < n
    assert metrics["policy/entropy"] == pytest.approx(
        scores.entropy_BT.sum().item() / tokens, rel=1e-6
    )
    zero = torch.zeros_like(scores.logprobs_BT)
    old = (
        k3(torch.where(MASK, scores.logprobs_BT - batch.old_logprobs_BT, zero), zero).sum().item()
        / tokens
    )
    assert metrics["kl/old"] == pytest.approx(old, rel=1e-6)
    reference = k3(scores.logprobs_BT, batch.reference_logprobs_BT)[MASK].mean().item()
    assert metrics["kl/reference"] == pytest.approx(reference, rel=1e-6)
    assert k1(zero, zero).sum() == k2(zero, zero).sum() == 0


@each
def test_metrics_carry_no_gradient(objective):
    batch = experience()
    scores = scores_of(table().requires_grad_(), batch.rollout.responses_BT, MASK, batch.rollout)
    metrics = objective.loss(batch, scores, objective.denominators(batch))[1]
    assert not any(part.requires_grad for pair in metrics.values() for part in pair)


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ON_POLICY.values(), ids=ON_POLICY)
def test_describe_names_every_axis_and_its_choice(objective):
    text = objective.describe()
    assert "\n" not in text
    for part, axis in zip(text.split(" | "), Objective.__dataclass_fields__, strict=True):
        name, rest = part.split(" ", 1)
        assert name == axis
        choice = getattr(objective, axis)
        assert rest.split("(")[0] == ("none" if choice is None else type(choice).__name__)


def test_describe_shows_the_arguments():
    objective = replace(
        COMPOSITIONS["everything"],
        surrogate=ClippedRatio(3e-4, 0.28, dual=3.0),
        support=TopK(8),
        advantage=LeaveOneOut(),
    )
    text = objective.describe()
    for words in (
        "support TopK(k=8, from_reference=False, outside=refuse)",
        "length=3, stride=1, tail=None, source=backbone, ratio=weighted, weights_N=[0.8, 0.1, 0.1]",
        "advantage LeaveOneOut |",
        "ClippedRatio(low=0.0003, high=0.28, dual=3)",
        "EntropyBonus(coef=0.2)",
        "KLPenalty(controller=ConstantCoefficient(coefficient=0.3), estimator=k3, place=loss)",
    ):
        assert words in text


def test_a_surrogate_of_token_probabilities_is_refused_over_other_actions():
    class NeedsTokens(ClippedRatio):
        needs_token_actions = True

    NeedsTokens.__module__ = "tests"
    compose(surrogate=NeedsTokens())
    for actions in (SequenceActions(), BlockActions(FutureShare(), length=3)):
        message = f"`NeedsTokens` needs probabilities of single tokens and has no meaning over `{type(actions).__name__}`"
        with pytest.raises(UserError, match=message):
            compose(actions, NeedsTokens())
