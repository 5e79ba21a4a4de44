"""The step from a fixed support to a policy that bars ids."""

from __future__ import annotations

from lightning_mpo.objective.supports import Support
from lightning_mpo.policies.base import Policy


def bar_tokens(policy: Policy, support: Support) -> None:
    """Let a policy bar the ids that a support bars at every step.

    A support without `AllowedTokens` changes nothing, so an evaluation on the whole vocabulary keeps
    the ids of training.

    Args:
        policy: its weights need not be loaded.
        support: of the objective or of a request.

    Raises:
        UserError: no response could end, or no token besides the end is left.
    """
    fixed = support.fixed
    if fixed.bars:
        fixed.check(policy.vocabulary)
        policy.bar(fixed.barred(policy.token_texts, policy.end_tokens))
