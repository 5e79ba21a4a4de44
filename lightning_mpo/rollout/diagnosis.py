"""Why a rollout teaches nothing, from the rollout alone: one sentence for each cause."""

from __future__ import annotations

from torch import Tensor

from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.types import Finish

SOLVED_PATIENCE = 5
"""Factor of the patience where every completion is right: a solved run may end like this."""


def diagnose(event: RolloutEvent, flat: int, patience: int) -> list[tuple[str, bool, str]]:
    """Return (cause, whether it holds, sentence) for each problem that a rollout can show.

    A rollout without a gradient has only one cause here: the first that holds. Difficulty is the
    last one.

    Args:
        event: a finished rollout.
        flat: rollouts in a row without a gradient, this one included.
        patience: such rollouts before a warning.
    """
    rollout, scores = event.experience.rollout, event.scores
    rows, longest = len(scores.rewards_B), rollout.response_mask_BT.shape[1]
    # causes that explain a rollout without a gradient
    unjudged = rows - int(scores.judged_B.sum())
    answered = bool(scores.answered_B.any())
    truncated = bool((rollout.finish_B == Finish.LENGTH).all())
    # rollouts in a row without a gradient
    late = flat >= patience * (SOLVED_PATIENCE if _solved(event) else 1)
    other_cause = unjudged == rows or not answered or truncated
    return [
        (
            "unjudged",
            unjudged > 0,
            f"{unjudged} of {rows} completions were judged by no reward (each returned None), "
            "and "
            + ("so nothing is learnt" if unjudged == rows else "carry no loss")
            + ": give `rollout.rewards` one that judges these rows, or take them out of `data`",
        ),
        (
            "truncated",
            truncated,
            f"all {rows} completions were cut off at {longest} tokens: raise "
            "`rollout.max_new_tokens`, or check that the end token is among those the policy "
            "may sample",
        ),
        (
            "unparsed",
            unjudged < rows and not answered,
            f"no answer could be parsed from any of the {rows - unjudged} completions: say in "
            "`data.instruction` how an answer is to be written, or choose another reward",
        ),
        ("flat", late and not other_cause, _why_flat(event, flat)),
    ]


def is_flat(event: RolloutEvent) -> bool:
    """Return whether all advantages are alike. With a critic its errors make them differ."""
    if event.experience.values_BT is None:
        return not bool(event.experience.advantages_BT.any())
    rewards_B = event.scores.rewards_B[event.scores.valid_B]
    return bool((rewards_B == rewards_B[:1]).all())


def sampler_gap(event: RolloutEvent) -> float | None:
    """Return the mean absolute difference between the log-probs of sampler and trainer, in nats.

    None: the trainer scored nothing before the updates, or the likelihood of a masked policy is not
    that of the sampler.
    """
    experience, rollout = event.experience, event.experience.rollout
    if experience.old_logprobs_BT is None or rollout.reveal_BT is not None:
        return None
    mask_BT = experience.mask_BT
    if rollout.outside_BT is not None:
        mask_BT = mask_BT & ~rollout.outside_BT
    gap_BT = (experience.old_logprobs_BT - rollout.behaviour_logprobs_BT).abs()
    return float(gap_BT[mask_BT].mean()) if bool(mask_BT.any()) else None


def _solved(event: RolloutEvent) -> bool:
    decided_B = event.scores.decided_B
    return bool(decided_B.any()) and bool(event.scores.correct_B[decided_B].all())


def _why_flat(event: RolloutEvent, flat: int) -> str:
    """Return why no completion is better than another of the same prompt."""
    scores, critic = event.scores, event.experience.values_BT is not None
    # words of the messages
    rewards_B, span = scores.rewards_B[scores.judged_B], f"of the last {flat} rollouts"
    level = f"{rewards_B.mean():.3g}" if len(rewards_B) else "none"
    groups_B = event.experience.rollout.group_B.cpu()
    if (
        scores.valid_B.any()
        and not critic
        and groups_B[scores.valid_B].unique(return_counts=True)[1].max() < 2
    ):
        return (
            f"no prompt {span} has two completions that a reward judged, so nothing is "
            "learnt: rewards that return None leave nothing to compare"
        )
    # rewards that differ within a group, and their sum does not
    different = [name for name, part_B in scores.by_reward.items() if _differ(part_B, groups_B)]
    if different and not _differ(scores.rewards_B, groups_B):
        names = ", ".join(f"`{name}`" for name in different)
        return (
            f"no prompt {span} has completions of different reward (all about {level}), "
            f"although {names} tells them apart: the weights of `rollout.rewards` cancel, or "
            "one part is so large that float64 loses another"
        )
    # rewards differ, and advantages do not
    if different:
        return (
            f"no prompt {span} has completions of different advantage, although their rewards "
            "differ, so nothing is learnt: look at `objective.advantage` and "
            "`rollout.mask_truncated`"
        )
    return _why_equal(event, span, level)


def _why_equal(event: RolloutEvent, span: str, level: str) -> str:
    """Return why no reward tells completions of one prompt apart."""
    scores, critic = event.scores, event.experience.values_BT is not None
    if _solved(event):
        return (
            f"all completions {span} are right, so nothing is learnt: the data are solved; end the "
            "run, or take harder rows in `data`"
        )
    if scores.decided_B.any() and not scores.correct_B.any():
        return (
            f"no completion {span} is right (all have a reward of about {level}), although answers "
            "were read, so nothing is learnt: compare an answer in `completions/` with its "
            "`target` (units, separator, form), else take easier rows in `data` or a graded reward"
        )
    if critic:
        return (
            f"all completions {span} have the reward {level}, so nothing is learnt except "
            "from errors of the critic: change the difficulty of `data`, or give a graded "
            "reward"
        )
    return (
        f"no prompt {span} has completions of different reward (all about {level}), so "
        "nothing is learnt: change the difficulty of `data`, raise `rollout.completions`, or "
        "give a graded reward"
    )


def _differ(values_B: Tensor, group_B: Tensor) -> bool:
    """Whether two completions of one prompt have different values; nan does not count."""
    groups = (values_B[group_B == g] for g in group_B.unique())
    return any(len(values_G[~values_G.isnan()].unique()) > 1 for values_G in groups)
