"""Hands the reference of a policy to rewards that read its log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.base import Reward
from lightning_mpo.rewards.reference import Reference, ReferenceReward
from lightning_mpo.types import Rollout


def need_reference(rewards: Sequence[Reward], policy: Policy) -> bool:
    """Return whether a reward reads log-probs of the reference.

    Args:
        rewards: of the run.
        policy: its weights need not be loaded.

    Raises:
        UserError: the policy is masked, so its log-probs need noise.
    """
    readers = [reward for reward in rewards if isinstance(reward, ReferenceReward)]
    if readers and policy.masked:
        raise UserError(
            f"`{readers[0].title}` reads log-probs of token after token, and "
            f"`{type(policy).__name__}` is a masked language model: use `CausalPolicy`"
        )
    return bool(readers)


def connect_rewards(rewards: Sequence[Reward], module: PolicyOptimization) -> None:
    """Set the reference of rewards that read its log-probs, at temperature 1.

    Args:
        rewards: of the run.
        module: of the run; it keeps a reference.
    """

    def score(rollout: Rollout) -> Tensor:
        scorer = replace(module.scorer(), temperature=1.0)
        return scorer.score(rollout, reference=True).logprobs_BT

    for reward in rewards:
        if isinstance(reward, ReferenceReward):
            reward.reference = Reference(score, module.device)
