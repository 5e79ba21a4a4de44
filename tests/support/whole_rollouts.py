"""Rollouts that cover all cases of an update, and the losses and gradients of the package on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective import future_credit
from lightning_mpo.objective.advantages import GeneralizedAdvantage, GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.terms import HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import CausalPolicy, MTPHeads
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.collect import Collected, Collector
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.types import Finish, Rollout, take_rows
from tests.support import whole_updates as W
from tests.support.builders import END, PAD, VOCABULARY, right_padded, seeded, subclasses
from tests.support.critics import CRITICS

GROUP = 4
PROMPTS = [6, 9, 4]
RESPONSES = [5, 1, 3, 7, 7, 4, 2, 3, 6, 6, 1, 4]
LONGEST = 7
REWARDS = torch.tensor(
    [1.0, 0.25, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.75, 0.0, 0.0, 1.0], dtype=torch.float64
)
VALID = torch.tensor([True] * 6 + [False] + [True] * 5)
GAPS = [(0, 2), (3, 3), (4, 1), (4, 4), (8, 0), (9, 5)]
"""Tokens that are not in their support, with `Case.support` "gaps"."""
MICRO_BATCHES = 2
CREDITS = {
    "same": future_credit.SameCredit,
    "outcome": future_credit.OutcomeCredit,
    "centred": future_credit.CentredCredit,
    "state": future_credit.StateCredit,
}
FAMILIES = {family.family: family for family in subclasses(MTPHeads)}


# --- the rollout ----------------------------------------------------------------------------------------------------


def make_rollout(support: str | None) -> Rollout:
    """Return responses that share first tokens and end at once, early or not, to prompts of three lengths.

    Args:
        support: None, "six", "slots" or "gaps", as in `Case`.
    """
    draw, B, S, T = seeded(11), len(RESPONSES), max(PROMPTS) + 1, LONGEST
    group_B = torch.arange(B) // GROUP
    # prompts, with a column more of padding than the longest needs
    prompt_mask = right_padded(PROMPTS, S).flip(1)[group_B]
    prompts = torch.randint(2, VOCABULARY, (len(PROMPTS), S), generator=draw)[group_B]
    # responses of two letters, and an end where they are short
    mask_BT, lengths = right_padded(RESPONSES, T), torch.tensor(RESPONSES)
    tokens_BT = torch.randint(2, 4, (B, T), generator=draw)
    ended_B = lengths < T
    last_BT = torch.arange(T) == lengths[:, None] - 1
    tokens_BT = tokens_BT.masked_fill(last_BT & ended_B[:, None], END)
    rollout = Rollout(
        tokens_BL=torch.cat(
            [prompts.masked_fill(~prompt_mask, PAD), tokens_BT.masked_fill(~mask_BT, PAD)], 1
        ),
        attention_mask_BL=torch.cat([prompt_mask, mask_BT], 1),
        response_mask_BT=mask_BT,
        group_B=group_B,
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.where(ended_B, int(Finish.STOP), int(Finish.LENGTH)),
    )
    if support is None:
        return rollout
    # six random ids a token, of which the first is the sampled one, in random slots
    scores = torch.rand(B, T, VOCABULARY, generator=draw).scatter(2, tokens_BT[..., None], -1.0)
    places = torch.rand(B, T, 6, generator=draw).argsort(-1)
    order_BTV = scores.argsort(-1)
    if support == "gaps":
        for b, t in GAPS:
            order_BTV[b, t] = order_BTV[b, t].roll(-1)
    rollout = replace(rollout, support_BTK=order_BTV[..., :6].gather(2, places).int())
    if support != "slots":
        return rollout
    used = torch.rand(B, T, 6, generator=draw) < 0.6
    used = (used | (torch.arange(6) == 0)).gather(2, places)
    return replace(rollout, support_mask_BTK=used)


def rows_of(rollout: Rollout, case: W.Case) -> list[W.Row]:
    """Return the rollout as plain lists, for the oracle."""
    rows, S = [], rollout.prompt_length
    for b, length in enumerate(RESPONSES):
        response = rollout.tokens_BL[b, S : S + length].tolist()
        supports: list[list[int] | None] = [None] * length
        if rollout.support_BTK is not None:
            slots = torch.ones_like(rollout.support_BTK[b], dtype=torch.bool)
            if rollout.support_mask_BTK is not None:
                slots = rollout.support_mask_BTK[b]
            supports = [rollout.support_BTK[b, t][slots[t]].tolist() for t in range(length)]
        # a token outside of its support joins it, and carries no loss
        counts = [
            ids is None or token in ids for token, ids in zip(response, supports, strict=True)
        ]
        for t in range(length):
            if not counts[t]:
                supports[t] = [*supports[t], response[t]]
        cut = case.mask_truncated and int(rollout.finish_B[b]) == Finish.LENGTH
        rows.append(
            W.Row(
                group=b // GROUP,
                prompt=rollout.tokens_BL[b, S - PROMPTS[b // GROUP] : S].tolist(),
                response=response,
                supports=supports,
                reward=REWARDS[b].item(),
                valid=bool(VALID[b]),
                learns=bool(VALID[b]) and not cut,
                counts=counts,
            )
        )
    return rows


# --- policy and objective -------------------------------------------------------------------------------------------


def make_policy(case: W.Case, tiny_policy: Any) -> CausalPolicy:
    """Return a policy in float64 whose heads and critic have weights that matter."""
    heads = critic = None
    if case.source == "mtp":
        heads = FAMILIES[case.family](
            offsets=case.offsets, detach_trunk=case.detached, support=case.heads_support
        )
    if case.advantage == "gae":
        critic = CRITICS[case.critic]()
    policy = tiny_policy(
        sharp=4.0,
        double=True,
        hidden_size=16,
        layers=1,
        reference=case.kl is not None,
        mtp=heads,
        critic=critic,
        share_prompts=case.share_prompts,
    )
    move(policy, 0.05, seed=1)
    for part in (policy.mtp, policy.critic):
        if part is not None:
            move(part, 0.2, seed=2)
    return policy


def move(module: nn.Module, size: float, *, seed: int) -> None:
    """Add noise to every weight."""
    draw = seeded(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += size * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)


def make_objective(case: W.Case) -> Objective:
    """Return the objective of a case."""
    credit = None if case.credit is None else CREDITS[case.credit](negatives=case.negatives)
    terms: list[Any] = []
    if case.source == "mtp":
        terms.append(HeadUpkeep(case.upkeep))
    if case.advantage == "gae":
        terms.append(ValueLoss(W.VALUE_COEF, case.value_clip))
    if case.kl is not None:
        estimator = "k3" if case.kl == "loss" else "k1"
        terms.append(KLPenalty(ConstantCoefficient(W.KL_COEF), estimator, case.kl))
    supports = {
        None: FullVocabulary(),
        "six": TopK(6),
        "slots": Nucleus(max_k=6),
        "gaps": TopK(6, outside="drop"),
    }
    return Objective(
        support=supports[case.support],
        actions=BlockActions(
            FutureShare(case.share),
            length=case.length,
            stride=case.stride,
            tail=case.tail,
            source=case.source,
            credit=credit,
        ),
        advantage=GeneralizedAdvantage(case.gamma, case.lam, length=case.action)
        if case.advantage == "gae"
        else GroupRelative(),
        surrogate=ClippedRatio(W.LOW, W.HIGH),
        reduction=TokenMean() if case.reduction == "tokens" else SequenceMean(),
        terms=terms,
    )


# --- from the rollout to gradients ----------------------------------------------------------------------------------


class Replay:
    """Stands in for prompts and sampler: the rollout is there already."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def training_rows(self, counter, count, round=0):
        return list(range(count))

    def encode(self, rows):
        return None

    def sample(self, policy, prompts, completions, request, *, generator, progress=None):
        return self.rollout


def make_module(policy: CausalPolicy, objective: Objective) -> PolicyOptimization:
    """Return the module of a run."""
    module = PolicyOptimization(policy, objective, temperature=W.TEMPERATURE)
    module.trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        accumulate_grad_batches=MICRO_BATCHES,
    )
    return module


def collect(case: W.Case, module: PolicyOptimization, rollout: Rollout) -> Collected:
    """Judge, score and plan the rollout as a run does."""
    replay = Replay(rollout)
    collector = Collector(
        replace(module.scorer(), tokens=4 * rollout.tokens_BL.shape[1]),
        module.objective,
        replay,
        replay,
        lambda rollout: Scores(REWARDS, VALID, VALID, VALID, {}, VALID),
        Schedule(len(PROMPTS), GROUP, minibatches=2, micro_batches=MICRO_BATCHES),
        LONGEST,
        mask_truncated=case.mask_truncated,
        parity_gate=False,
    )
    return collector.collect(0, reference=case.kl is not None)


def run_update(module: PolicyOptimization, collected: Collected, update: int) -> float:
    """Return the loss of an update; gradients are left in the weights."""
    module.policy.zero_grad()
    total = 0.0
    for rows in collected.plan[update]:
        batch = {
            "micro_batch": take_rows(collected.experience, rows),
            "denominators": collected.denominators[update],
            "last_of_update": False,
        }
        part = module.training_step(batch, 0) / MICRO_BATCHES  # as Lightning does
        part.backward()
        total += part.item()
    return total


def gradients(policy: CausalPolicy) -> dict[str, Tensor]:
    """Return the gradients of trunk, heads and critic, and forget them."""
    parts = {"trunk": policy.network, "heads": policy.mtp, "critic": policy.critic}
    by_part = {
        name: torch.cat(
            [
                (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten()
                for weight in part.parameters()
            ]
        )
        for name, part in parts.items()
        if part is not None
    }
    policy.zero_grad()
    return by_part
