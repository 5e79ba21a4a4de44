"""The whole path on both sides: scoring, old and reference log-probs, advantages, loss, and the gradient of the weights.

The same tiny model, responses and rewards go through TRL's `_generate_and_score_completions` and
`_compute_loss`, and through `build_experience` and `training_step`. The policy has moved from its
reference before the rollout, and again before the update. Norms and rotations of a Llama are
computed in float32 whatever its weights are, hence the bound of float32 for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from oracle_batches import algorithm, deviation
from torch import Tensor, nn
from trl_bridge import CPU, MAX_TOKENS, VOCABULARY, quiet, score_completions, trainer
from trl_differences import Difference, Measured

from lightning_mpo.functional.advantages import at_last_token, moments, whiten
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.advantages import Advantage, GroupRelative, LeaveOneOut
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.experience import build_experience
from lightning_mpo.types import Rollout

GROUP, TEMPERATURE = 4, 0.7


@dataclass(frozen=True)
class Path:
    """One algorithm on both sides."""

    name: str
    objective: Objective
    trl: dict[str, Any]
    config: str = ""


def _paths() -> tuple[Path, ...]:
    grpo = algorithm("grpo")
    penalised = replace(grpo, terms=[KLPenalty(ConstantCoefficient(0.3), "k3", "loss")])
    sequence = {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    }
    return (
        Path("grpo", grpo, {"loss_type": "grpo"}, "grpo"),
        Path(
            "dr_grpo",
            algorithm("dr_grpo"),
            {"loss_type": "dr_grpo", "scale_rewards": "none"},
            "dr_grpo",
        ),
        Path("dapo", algorithm("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}, "dapo"),
        Path("cispo", algorithm("cispo"), {"loss_type": "cispo", "epsilon_high": 5.0}, "cispo"),
        Path("GSPO", algorithm("gspo"), sequence, "gspo"),
        Path(
            "grpo, beta",
            penalised,
            {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        ),
        Path(
            "RLOOTrainer, k1 in the reward", algorithm("rloo"), {"rloo": True, "beta": 0.05}, "rloo"
        ),
    )


PATHS = _paths()


@dataclass(frozen=True)
class Compared:
    """An advantage on both sides."""

    name: str
    ours: Advantage
    trl: dict[str, Any]
    text: str = ""


ADVANTAGES = (
    Compared("scale_rewards group", GroupRelative("std"), {}, "`GroupRelative(std)`"),
    Compared(
        "scale_rewards none",
        GroupRelative("none"),
        {"scale_rewards": "none"},
        "`GroupRelative(none)`",
    ),
    Compared("RLOOTrainer", LeaveOneOut(), {"rloo": True}, "`LeaveOneOut`"),
)


def responses(groups: int = 3, size: int = GROUP) -> Rollout:
    """Return random prompts and ragged random responses."""
    g = torch.Generator().manual_seed(5)
    B, S, T = groups * size, 6, MAX_TOKENS - 2
    group_B = torch.arange(groups).repeat_interleave(size)
    prompt_mask = (torch.arange(S) < torch.randint(2, S + 1, (groups, 1), generator=g)).flip(1)[
        group_B
    ]
    prompt_ids = torch.randint(2, VOCABULARY, (groups, S), generator=g)[group_B]
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    mask[0] = True
    tokens = torch.randint(1, VOCABULARY, (B, T), generator=g)
    return Rollout(
        tokens_BL=torch.cat([prompt_ids * prompt_mask, tokens * mask], 1),
        attention_mask_BL=torch.cat([prompt_mask, mask], 1),
        response_mask_BT=mask,
        group_B=group_B,
        behaviour_logprobs_BT=torch.zeros(B, T),
        finish_B=torch.zeros(B, dtype=torch.long),
    )


def move(network: nn.Module, seed: int, scale: float) -> None:
    """Add noise to the weights, the same to equal networks."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=g).to(weight))


def scores_of(rewards: Sequence[float | None]) -> Scores:
    """Return rewards as our modules take them; None is no judgement."""
    valid_B = torch.tensor([reward is not None for reward in rewards])
    rewards_B = torch.tensor([reward or 0.0 for reward in rewards])
    return Scores(
        rewards_B, valid_B, correct_B=valid_B, answered_B=valid_B, by_reward={}, decided_B=valid_B
    )


def gradients(network: nn.Module) -> Tensor:
    return torch.cat(
        [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
    )


NUDGES = {"gspo": 1e-4}
"""How far the weights move between rollout and update; GSPO's clip is narrow."""


@dataclass(frozen=True)
class Both:
    """Gradients of all weights."""

    ours: Tensor
    theirs: Tensor
    clipped: float | None  # share of the actions; None where nothing is clipped


def path_gradients(
    path: Path, folder: str, rewards: Sequence[float | None], *, double: bool
) -> Both:
    """Send responses and rewards through both whole paths."""
    rollout, nudge = responses(), NUDGES.get(path.config, 3e-2)
    options = {
        "num_generations": GROUP,
        "temperature": TEMPERATURE,
        "per_device_train_batch_size": len(rewards),
    }
    made, policy = trainer(folder, double=double, **options, **path.trl), CausalPolicy(folder)
    module = PolicyOptimization(policy, path.objective, temperature=TEMPERATURE)
    with quiet():
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        policy.build(device=CPU, reference=True)
    network = policy.network
    assert network is not None
    if double:
        policy.double()
    for model in (made.model, network):
        move(model, 1, 3e-2)
    inputs = score_completions(made, rollout, rewards)
    experience = build_experience(
        module.scorer(),
        path.objective,
        rollout,
        scores_of(rewards),
        torch.Generator(),
        updates=2,
        reference=path.objective.needs_reference,
    )
    for model in (made.model, network):
        move(model, 2, nudge)
    made._compute_loss(made.model, inputs).backward()
    batch = {"micro_batch": experience, "denominators": path.objective.denominators(experience)}
    module.training_step(batch | {"last_of_update": False}, 0).backward()
    clipped = module.metrics.sums.get("ratio/clip_fraction")
    return Both(
        gradients(network),
        gradients(made.model),
        None if clipped is None else (clipped[0] / clipped[1]).item(),
    )


def compare_paths(path: Path, folder: str, *, double: bool) -> float:
    """Return the deviation of the gradients of all weights."""
    both = path_gradients(path, folder, draw_rewards(3 * GROUP), double=double)
    if both.clipped is not None and not 0 < both.clipped < 1:
        raise RuntimeError(
            f"{path.name}: {both.clipped:.0%} of the actions are clipped; one branch is not compared"
        )
    return deviation(both.ours, both.theirs)


def draw_rewards(count: int, *, unjudged: Sequence[int] = ()) -> list[float | None]:
    """Return random rewards; some responses no reward could judge."""
    rewards: list[float | None] = torch.randn(
        count, generator=torch.Generator().manual_seed(count)
    ).tolist()
    return [None if b in unjudged else reward for b, reward in enumerate(rewards)]


def both_advantages(
    compared: Compared, folder: str, rewards: Sequence[float | None], size: int
) -> tuple[Tensor, Tensor]:
    """Return our advantages and TRL's. Shape `[B]` each."""
    rollout, scores = responses(len(rewards) // size, size), scores_of(rewards)
    made = trainer(
        folder, num_generations=size, per_device_train_batch_size=len(rewards), **compared.trl
    )
    mask_BT, valid_B = rollout.response_mask_BT, scores.valid_B
    rewards_BT = at_last_token(scores.rewards_B, mask_BT)
    advantages_BT = compared.ours.estimate(
        Outcome(rewards_BT, mask_BT, size, valid_B)
    ).advantages_BT
    if compared.ours.whiten:
        valid_BT = mask_BT & valid_B[:, None]
        advantages_BT = whiten(advantages_BT, valid_BT, moments(advantages_BT, valid_BT))
    return advantages_BT[:, 0], score_completions(made, rollout, rewards)["advantages"]


def compare_advantages(compared: Compared, folder: str) -> float:
    """Return the largest deviation over group sizes, with and without responses that no reward could judge."""
    worst = 0.0
    for size in (2, 3, 4, 8):
        for unjudged in ((), (0, 3 * size - 1)):
            rewards = draw_rewards(3 * size, unjudged=unjudged)
            worst = max(worst, deviation(*both_advantages(compared, folder, rewards, size)))
    return worst


# --- where they differ ----------------------------------------------------------------------------------------------


def unjudged_rows(folder: str) -> Measured:
    dapo = next(path for path in _paths() if path.config == "dapo")
    rewards = draw_rewards(3 * GROUP, unjudged=(1, 6))
    both = path_gradients(dapo, folder, rewards, double=True)
    lengths_B = responses().response_mask_BT.sum(1)
    judged_B = torch.tensor([reward is not None for reward in rewards])
    share = lengths_B[judged_B].sum() / lengths_B.sum()
    return deviation(both.ours, both.theirs), deviation(both.ours * share, both.theirs)


def equal_rewards(folder: str) -> Measured:
    value_B, expected_B = both_advantages(ADVANTAGES[0], folder, [10.1] * 7, 7)
    return expected_B.abs().max().item(), value_B.abs().max().item()


def scale_of_batch(folder: str) -> Measured:
    rewards = draw_rewards(12)
    batch = Compared("", GroupRelative("batch"), {"scale_rewards": "batch"})
    value_B, expected_B = both_advantages(batch, folder, rewards, 4)
    centred_B, _ = both_advantages(ADVANTAGES[1], folder, rewards, 4)
    explained_B = centred_B / (scores_of(rewards).rewards_B.std() + 1e-4)
    return deviation(value_B, expected_B), deviation(explained_B, expected_B)


DIFFERENCES = (
    Difference(
        "rewards of None",
        "TRL gives such a response advantage 0 and keeps its tokens in every denominator; ours drops it from them",
        unjudged_rows,
    ),
    Difference(
        "groups of equal rewards",
        "TRL divides the rounding of the mean by 1e-4 (measured: its largest advantage of seven rewards of 10.1); ours is 0",
        equal_rewards,
    ),
    Difference(
        "`scale_rewards: batch`",
        "TRL divides by the deviation of the rewards; our `scale: batch` whitens over tokens (REINFORCE++ baseline)",
        scale_of_batch,
    ),
)
