"""From rewards to the gradient, for the algorithms that no oracle has: a loop over tokens in float64.

RLOO, REINFORCE and REINFORCE++ as their files in `configs/algorithm` name them, with the KL penalty in the reward,
returns, whitening, ratio and reduction, against scalars written from docs/algorithms.md 4.2 and 4.3.
"""

from __future__ import annotations

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.advantages import ReturnToGo
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.experience import build_experience
from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Rollout
from tests.support.builders import VOCABULARY, relative_error, right_padded, scores_of, seeded
from tests.support.objectives import ALGORITHMS, from_yaml

GROUP, LENGTHS = 3, [4, 6, 1, 3, 5, 2, 6, 6, 2]
MASK = right_padded(LENGTHS)
B, T = MASK.shape
TOKENS = torch.randint(0, VOCABULARY, (B, T), generator=seeded(0))
REWARDS = torch.randn(B, generator=seeded(1), dtype=torch.float64)
ALL = torch.ones(B, dtype=torch.bool)
SOME = torch.tensor([True, True, True, True, False, True, True, True, True])
BETA, LOW, HIGH = 0.7, 0.2, 0.2
FILES = {path.stem: path for path in ALGORITHMS}
SUBJECTS = [
    ("rloo", 1.0),
    ("reinforce", 1.0),
    ("reinforce", 0.9),
    ("reinforce_plus_plus", 1.0),
    ("reinforce_plus_plus", 0.9),
    ("reinforce_plus_plus_baseline", 1.0),
]


class LogitTable(Policy):
    """A policy that is a table of logits; its reference is another."""

    tokenizer, vocabulary, end_tokens = None, VOCABULARY, ()

    def __init__(self) -> None:
        super().__init__()
        draws = [
            torch.randn(B, T, VOCABULARY, generator=seeded(s), dtype=torch.float64) for s in (2, 3)
        ]
        self.logits = torch.nn.Parameter(draws[0])
        self.reference = draws[0] + 0.3 * draws[1]

    def check(self, request=None) -> None: ...

    def build(self, *, device, reference) -> None: ...

    def trained_state(self, state):
        return state

    def score(self, rollout, mask_BT, *, temperature, request=None, reference=False) -> TokenScores:
        return scores_of(
            self.reference if reference else self.logits, rollout.responses_BT, mask_BT
        )


def subject(name: str, gamma: float) -> Objective:
    """Return the objective of a file, with a penalty that shows and another discount."""
    objective = from_yaml(FILES[name])
    kl = objective.term(KLPenalty)
    if kl is not None:
        assert (kl.estimator, kl.place) == ("k1", "reward")
        objective = replace(objective, terms=[replace(kl, controller=ConstantCoefficient(BETA))])
    if isinstance(objective.advantage, ReturnToGo):
        objective = replace(objective, advantage=ReturnToGo(gamma, objective.advantage.whiten))
    return objective


def ours(objective: Objective, valid_B: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return loss, gradient, and the logits at rollout and at the update."""
    policy = LogitTable()
    module = PolicyOptimization(policy, objective)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    rollout = Rollout(
        tokens_BL=torch.cat([torch.ones(B, 1, dtype=torch.long), TOKENS], 1),
        attention_mask_BL=torch.cat([torch.ones(B, 1, dtype=torch.bool), MASK], 1),
        response_mask_BT=MASK,
        group_B=torch.arange(B) // GROUP,
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.zeros(B, dtype=torch.long),
    )
    scores = Scores(
        REWARDS, valid_B, correct_B=valid_B, answered_B=valid_B, by_reward={}, decided_B=valid_B
    )
    experience = build_experience(
        module.scorer(),
        objective,
        rollout,
        scores,
        seeded(0),
        updates=2,
        reference=objective.needs_reference,
    )
    before = policy.logits.detach().clone()
    with torch.no_grad():
        policy.logits += 0.2 * torch.randn(
            B, T, VOCABULARY, generator=seeded(4), dtype=torch.float64
        )
    batch = {
        "micro_batch": experience,
        "denominators": objective.denominators(experience),
        "last_of_update": False,
    }
    loss = module.training_step(batch, 0)
    clipped, actions = module.metrics.sums.get("ratio/clip_fraction", (1, 2))
    assert 0 < clipped < actions  # both branches were there
    return loss.item(), torch.autograd.grad(loss, policy.logits)[0], before, policy.logits.detach()


def logprob(logits: Tensor, b: int, t: int) -> Tensor:
    return logits[b, t, TOKENS[b, t]] - logits[b, t].exp().sum().log()


def token_rewards(penalised: bool, before: Tensor, reference: Tensor) -> list[list[float]]:
    """r_t = -β (log π_old - log π_ref), and the reward on top at the last token."""
    rows = []
    for b, length in enumerate(LENGTHS):
        row = [
            -BETA * (logprob(before, b, t) - logprob(reference, b, t)).item() * penalised
            for t in range(length)
        ]
        row[-1] += REWARDS[b].item()
        rows.append(row)
    return rows


def others(returns: list[float], valid: list[bool], b: int, *, itself: bool) -> float:
    """Return the mean return of the valid responses to the same prompt, with or without this one."""
    group = [i for i in range(B) if i // GROUP == b // GROUP and valid[i] and (itself or i != b)]
    return sum(returns[i] for i in group) / len(group)


def whitened(rows: list[list[float]], valid: list[bool]) -> list[list[float]]:
    values = [x for row, counts in zip(rows, valid, strict=True) for x in row if counts]
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def naive_advantages(
    name: str, gamma: float, rows: list[list[float]], valid: list[bool]
) -> list[list[float]]:
    returns = [sum(row) for row in rows]
    if name == "rloo":
        return [
            [returns[b] - others(returns, valid, b, itself=False)] * n
            for b, n in enumerate(LENGTHS)
        ]
    if name == "reinforce_plus_plus_baseline":
        centred = [
            [returns[b] - others(returns, valid, b, itself=True)] * n for b, n in enumerate(LENGTHS)
        ]
        return whitened(centred, valid)
    to_go = [
        [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
        for row in rows
    ]
    return to_go if name == "reinforce" else whitened(to_go, valid)


def clipped(ratio: Tensor, advantage: float) -> Tensor:
    return -min(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)


def naive_loss(
    name: str, advantages: list[list[float]], valid: list[bool], before: Tensor, logits: Tensor
) -> Tensor:
    """RLOO: a mean over responses, the product of ratios; the others: a mean over tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, length in enumerate(LENGTHS):
        if not valid[b]:
            continue
        ell = [logprob(logits, b, t) - logprob(before, b, t).detach() for t in range(length)]
        if name == "rloo":
            total, count = total + clipped(sum(ell).exp(), advantages[b][0]), count + 1
            continue
        for x, advantage in zip(ell, advantages[b], strict=True):
            total = total + (-advantage * x if name == "reinforce" else clipped(x.exp(), advantage))
            count += 1
    return total / count


@pytest.mark.parametrize("valid_B", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize(("name", "gamma"), SUBJECTS)
def test_from_rewards_to_the_gradient_is_a_loop_over_tokens(name, gamma, valid_B):
    objective, valid = subject(name, gamma), valid_B.tolist()
    loss, gradient, before, logits = ours(objective, valid_B)
    rows = token_rewards(objective.needs_reference, before, LogitTable().reference)
    logits.requires_grad_()
    expected = naive_loss(name, naive_advantages(name, gamma, rows, valid), valid, before, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert loss == pytest.approx(
        expected.item(), rel=1e-6, abs=1e-8
    )  # rewards are rounded to float32
    assert relative_error(gradient, expected_gradient) < 1e-6
    assert not gradient[~valid_B].any()
