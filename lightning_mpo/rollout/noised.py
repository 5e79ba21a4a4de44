"""Experience of a masked policy: rows are repeated with noise of their own, and scored under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.noise import replayed_copies
from lightning_mpo.objective.likelihoods import Likelihood, Noise, behind_prompt
from lightning_mpo.objective.objective import Objective
from lightning_mpo.rollout.ranks import Total
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.types import NEVER, Experience, Rollout, take_rows


def with_noise(
    experience: Experience,
    likelihood: Likelihood,
    generator: torch.Generator,
    *,
    passes: int,
    drop_outside: bool = False,
) -> Experience:
    """Repeat the rows of an experience for each pass and each noised sample of a response.

    The rows of a pass are neighbours, and within a pass so are the rows of a response. Old, new and
    reference policy score a row under the noise that it holds.

    Args:
        experience: B rows with advantages, without log-probs.
        likelihood: draws the noise.
        generator: source of all randomness, on the CPU.
        passes: passes over the rollout, each with noise of its own.
        drop_outside: leave out tokens that were drawn from outside their support.

    Returns:
        passes · B · `repeats` rows. If log-probs of single tokens have a meaning, the tokens with a
        weight in some copy count. Otherwise all tokens of a response count, so that means and
        divergences are over its length.
    """
    rollout, device = experience.rollout, experience.rewards_B.device
    rows = torch.arange(len(rollout.group_B), device=device).repeat_interleave(likelihood.repeats)
    draws = [likelihood.draw(rollout, generator) for _ in range(passes)]
    repeated = take_rows(experience, rows)
    parts = [_one_pass(repeated, likelihood, noise, drop_outside) for noise in draws]
    return join_experiences(parts)


def _one_pass(
    experience: Experience, likelihood: Likelihood, noise: Noise, drop_outside: bool
) -> Experience:
    """Attach the noise of one pass to repeated rows."""
    rollout, device = experience.rollout, experience.rewards_B.device
    weights_BCT = noise.weights_BCT.to(device)
    if weights_BCT.shape[1] != likelihood.copies:
        raise UserError(
            f"`{type(likelihood).__name__}.copies` is {likelihood.copies}, and `draw` returns "
            f"{weights_BCT.shape[1]} copies of a row: return that number from `copies`"
        )
    # the tokens that count: those of the step or copy, or all of a response with one log-prob
    counted_BT = (weights_BCT > 0).any(1)
    if not likelihood.token_level:
        counted_BT = likelihood.scored(rollout)
    if drop_outside and rollout.outside_BT is not None:
        counted_BT = counted_BT & ~rollout.outside_BT
    # a response has one advantage, also for the tokens behind its end
    first_BT = rollout.response_mask_BT & (rollout.response_mask_BT.cumsum(1) == 1)
    advantages_B = (experience.advantages_BT * first_BT).sum(1)
    token_weights_BT = counted_BT.float()
    if noise.importance_B is not None:
        token_weights_BT = token_weights_BT * noise.importance_B.to(device)[:, None]
    return replace(
        experience,
        rollout=replace(
            rollout,
            response_mask_BT=likelihood.scored(rollout) | counted_BT,
            hidden_BCL=noise.hidden_BCL.to(device),
            copy_weights_BCT=weights_BCT,
        ),
        advantages_BT=advantages_B[:, None] * counted_BT,
        token_weights_BT=token_weights_BT,
    )


def join_experiences(parts: Sequence[Experience]) -> Experience:
    """Join the rows of experiences of equal widths."""
    rollouts = [part.rollout for part in parts]
    rollout = replace(parts[0].rollout, **_joined(rollouts))
    return replace(parts[0], rollout=rollout, **_joined(parts))


def _joined(parts: Sequence[Experience] | Sequence[Rollout]) -> dict[str, Any]:
    """Return the tensors of all parts, joined by name."""
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


def score_noised(
    scorer: Scorer,
    objective: Objective,
    experience: Experience,
    *,
    updates: int,
    reference: bool,
) -> Experience:
    """Score noised rows at rollout weights, with the policy and its reference.

    A likelihood that replays the steps of the sampler takes the sampler's log-probs as the old
    ones. They are of the same states, so no pass is needed.

    Args:
        scorer: scores with policy and reference.
        objective: has a likelihood.
        experience: from `with_noise`.
        updates: updates on the rollout. A single one computes old log-probs itself, unless they are
            compared with a reference.
        reference: whether to score with the reference as well.
    """
    rollout, likelihood = experience.rollout, objective.likelihood
    assert likelihood is not None
    old_BT = None
    if likelihood.needs_steps:
        scored_BT = experience.token_weights_BT > 0
        old_BT = torch.where(scored_BT, rollout.behaviour_logprobs_BT, 0.0)
    elif updates > 1 or reference:
        old_BT = scorer.score(rollout).logprobs_BT
    reference_BT = scorer.score(rollout, reference=True).logprobs_BT if reference else None
    return replace(experience, old_logprobs_BT=old_BT, reference_logprobs_BT=reference_BT)


def noise_metrics(objective: Objective, experience: Experience, total: Total) -> dict[str, float]:
    """Return the effective sample size of the rows' importance weights, divided by their number.

        likelihood/effective_share = (Σ w)² / (n Σ w²)     over the n rows of all ranks

    Args:
        objective: without importance weights, nothing is measured.
        experience: from `with_noise`.
        total: sums over ranks.
    """
    likelihood = objective.likelihood
    if likelihood is None or not likelihood.weighs_rows:
        return {}
    weights_B = experience.token_weights_BT.amax(1).double()
    sums = torch.stack([weights_B.sum(), weights_B.square().sum(), (weights_B > 0).sum().double()])
    first, second, rows = total(sums).tolist()
    return {"likelihood/effective_share": first**2 / max(rows * second, 1e-12)}


def replay_steps(rollout: Rollout, most: int = 32) -> Rollout:
    """Return a rollout whose log-probs are those of the sampler's own steps.

    Args:
        rollout: with the steps that the sampler records.
        most: largest number of steps to replay, spread evenly; each is a pass of the model.

    Raises:
        UserError: the sampler has recorded no steps.
    """
    reveal_BT = rollout.reveal_BT
    if reveal_BT is None:
        raise UserError(
            "the sampler of a masked policy must record at which step it revealed each token "
            "(`Rollout.reveal_BT`); use `rollout.sampler: DiffusionSampler`"
        )
    steps = reveal_BT[reveal_BT != NEVER].unique().cpu()
    if len(steps) > most:
        steps = steps[torch.linspace(0, len(steps) - 1, most).round().long()]
    copies = replayed_copies(reveal_BT.cpu().long(), steps.expand(len(reveal_BT), -1))
    device = reveal_BT.device
    weights_BCT = copies.weights_BCT.to(device)
    return replace(
        rollout,
        hidden_BCL=behind_prompt(rollout, copies.hidden_BCT).to(device),
        copy_weights_BCT=weights_BCT,
        response_mask_BT=(weights_BCT > 0).any(1),
    )
