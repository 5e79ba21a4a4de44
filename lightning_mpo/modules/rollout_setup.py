"""Checks before rollouts: combinations of options that are refused, and settings of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import Support, TopK
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.base import Reward, TokenReward
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.sampling.barring import bar_tokens
from lightning_mpo.sampling.base import Sampler
from lightning_mpo.sampling.replay import PrefixReplay


def check_rewards(
    rewards: Sequence[Reward], data: PromptDataModule, stage: str, max_new_tokens: int
) -> None:
    """Refuse rewards that cannot judge the completions of a data module.

    Args:
        rewards: of the rollout.
        data: serves the rows whose columns the rewards read.
        stage: the verb; "predict" needs no reward if the data has no targets.
        max_new_tokens: longest response.

    Raises:
        UserError: there is no reward, or one that does not fit lengths or columns.
    """
    if not rewards and (stage != "predict" or data.judged):
        raise UserError(
            "`rollout.rewards` is empty: name at least one reward, such as `MathAnswer`"
        )
    # columns besides prompt, target and solution
    rows = [*data.splits.train, *data.validation_rows]
    columns = list(dict.fromkeys(str(name) for row in rows for name in row.extra))
    data.check_response(max_new_tokens)
    if data.curriculum is not None and stage == "fit":
        data.curriculum.check(rewards)
    for reward in rewards:
        reward.check_columns(columns)
        reward.check(max_new_tokens)


def check_ks(option: str, ks: Sequence[int], completions: int) -> None:
    """Refuse a k of pass@k that has no meaning with this number of completions.

    Args:
        option: name of the option, for the message.
        ks: each k.
        completions: per problem.

    Raises:
        UserError: there is no k, or one is below 1 or above the number of completions.
    """
    bad = next((k for k in ks if isinstance(k, bool) or not 1 <= k <= completions), None)
    if not ks or bad is not None:
        raise UserError(
            f"`{option}` must hold numbers from 1 to {completions}, the completions of each "
            f"problem, got {list(ks) if bad is None else bad}"
        )


def check_sampling(
    objective: Objective,
    rewards: Sequence[Reward],
    completions: int,
    sampler: Sampler,
    replay: PrefixReplay | None,
    mask_truncated: bool,
) -> None:
    """Refuse options of a rollout that contradict the objective.

    Args:
        objective: the algorithm.
        rewards: of the rollout.
        completions: G, completions per prompt.
        sampler: draws responses.
        replay: restarts some completions inside others; None: all start at the prompt.
        mask_truncated: whether truncated responses carry no loss.

    Raises:
        UserError: names the option and the alternative.
    """
    objective.check_group(completions)
    for reward in rewards:
        if isinstance(reward, TokenReward):
            check_token_rewards(objective, reward.title)
    sampler.check(objective.surrogate.candidates)
    if mask_truncated and objective.advantage.weighs_tokens:
        raise UserError(
            "`rollout.mask_truncated` takes completions away that "
            f"`{type(objective.advantage).__name__}` counted at its branches; use "
            "`mask_truncated: false`"
        )
    if replay is not None:
        if not sampler.left_to_right:
            raise UserError(
                "`rollout.replay` copies the first tokens of other completions, and "
                f"`{type(sampler).__name__}` does not draw from left to right; use "
                "`rollout.replay: null`"
            )
        if objective.support.by_step:
            raise UserError(
                "`rollout.replay` begins completions within others, and "
                f"`{type(objective.support).__name__}` gives the first token a support of its own: "
                "use `rollout.replay: null`"
            )
        replay.check(completions, objective.advantage)


def check_likelihood(policy: Policy, objective: Objective) -> None:
    """Refuse an objective for the other kind of policy, causal or masked.

    Args:
        policy: its weights need not be loaded.
        objective: the algorithm.

    Raises:
        UserError: a masked policy has no likelihood, or a causal one has one.
    """
    name, likelihood = type(policy).__name__, objective.likelihood
    if policy.masked and likelihood is None:
        raise UserError(
            f"`{name}` is a masked language model, and `objective.likelihood` is not set: give "
            "`CoupledElbo`, `Elbo` or `Denoising`, or use `CausalPolicy`"
        )
    if likelihood is not None and not policy.masked:
        raise UserError(
            f"`objective.likelihood: {type(likelihood).__name__}` hides tokens of a response, and "
            f"`{name}` is a causal language model: give `likelihood: null`, or a masked policy "
            "such as `MaskedPolicy`"
        )


def check_policy(policy: Policy, objective: Objective) -> None:
    """Refuse an objective that needs scores, ids or texts that a policy does not have.

    Args:
        policy: its weights need not be loaded.
        objective: the algorithm.

    Raises:
        UserError: names the part of the objective and the alternative.
    """
    policy.check(objective.request)
    check_support(policy, objective.support)
    check_steps(policy, objective)
    objective.surrogate.check(policy.vocabulary)
    if objective.actions.needs_texts:
        objective.actions.check(policy.token_texts)


def check_steps(policy: Policy, objective: Objective) -> None:
    """Refuse a support that depends on the step beside parts that take every step as equal.

    Args:
        policy: its weights need not be loaded.
        objective: the algorithm.

    Raises:
        UserError: the policy is masked, or heads or candidates are scored; a token is unknown.
    """
    if not objective.support.by_step:
        return
    name = type(objective.support).__name__
    other = None
    if policy.masked:
        other = f"`{type(policy).__name__}` reveals tokens in any order"
    elif objective.request.future:
        other = "multi-token heads predict tokens of several steps"
    elif objective.surrogate.candidates:
        other = f"`{type(objective.surrogate).__name__}.top_k` compares the same number at each"
    if other is not None:
        raise UserError(
            f"`objective.support` {name} depends on the step, and {other}: use another support"
        )
    objective.support.resolved(lambda: policy.token_texts)


def check_support(policy: Policy, support: Support) -> None:
    """Refuse a support that a policy's vocabulary cannot hold; let the policy bar what it bars.

    Args:
        policy: its weights need not be loaded.
        support: of the objective.

    Raises:
        UserError: the support has more ids than can be drawn.
    """
    support.check(policy.vocabulary)
    bar_tokens(policy, support)
    free = policy.vocabulary - len(policy.barred)
    if support.slots is not None and support.slots > free:
        raise UserError(
            f"`objective.support` {type(support).__name__} keeps {support.slots} ids of a step, "
            f"and {free} of {policy.vocabulary} can be drawn: the other ones are barred and have "
            f"probability 0; set its size to at most {free}"
        )
    if isinstance(support, TopK) and support.slots == policy.vocabulary:
        rank_zero_warn(
            f"`TopK.k` is the whole vocabulary of {policy.vocabulary} tokens: nothing is left out"
        )


def check_offsets(objective: Objective, max_new_tokens: int) -> None:
    """Refuse multi-token heads that predict tokens behind the longest response.

    Args:
        objective: the algorithm.
        max_new_tokens: longest response, tokens.

    Raises:
        UserError: names the offset, and the option to change.
    """
    offsets = objective.request.future
    # blocks, or a loss term of heads
    option, most = "`objective.actions.length`", max_new_tokens
    if not objective.actions.future:
        option, most = "`HeadPolicyLoss.offsets`", max_new_tokens - 1
    if offsets >= max_new_tokens:
        raise UserError(
            f"the objective uses multi-token heads up to offset {offsets}, a block of "
            f"{offsets + 1} tokens, and `rollout.max_new_tokens` is {max_new_tokens}: raise it, "
            f"or set {option} to at most {most}"
        )


def check_token_rewards(objective: Objective, reward: str) -> None:
    """Refuse a `TokenReward` for an objective that cannot use a number for each token.

    Args:
        objective: the algorithm.
        reward: name of the reward.

    Raises:
        UserError: names the parts of the objective, the reward and an alternative.
    """
    advantage, actions = objective.advantage, objective.actions
    if advantage.weighs_tokens:
        raise UserError(
            f"`{type(advantage).__name__}` compares rewards of responses, and `{reward}` gives "
            "each token a number; use a reward that gives each response one number"
        )
    if actions.one_per_response and advantage.to_go:
        raise UserError(
            f"`{type(actions).__name__}` takes one advantage for a response, and "
            f"`{type(advantage).__name__}` gives its tokens different ones by the reward "
            f"`{reward}`; use `SequenceActions.form: token`"
        )


def check_accumulation(trainer: L.Trainer) -> None:
    """Refuse a callback that changes the number of micro-batches during training."""
    if any(isinstance(other, GradientAccumulationScheduler) for other in callbacks_of(trainer)):
        raise UserError(
            "`GradientAccumulationScheduler` changes the number of micro-batches, which is fixed "
            "within a rollout; set `trainer.accumulate_grad_batches` instead"
        )


def shorten_fast_dev_run(trainer: L.Trainer) -> None:
    """Let a `fast_dev_run` use one micro-batch per update and write no `last.ckpt`, in place."""
    trainer.accumulate_grad_batches = 1
    # Lightning 2.6.6 writes last.ckpt even in a fast_dev_run
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.save_last = False


def announce(objective: Objective, schedule: Schedule) -> None:
    """Print the schedule and the objective; warn of an on-policy surrogate over several updates."""
    if schedule.updates > 1 and objective.surrogate.on_policy:
        rank_zero_warn(
            f"`{type(objective.surrogate).__name__}` is meant for one update per rollout, and "
            f"there are {schedule.updates}: later ones are biased, as nothing weighs what older "
            "weights sampled; set `rollout.minibatches` and `rollout.epochs` to 1, or take a "
            "surrogate with ratios"
        )
    in_row = 1 if objective.likelihood is None else objective.likelihood.copies
    rank_zero_info(f"rollout    {schedule.describe(in_row)}")
    axes = [axis for axis in objective.describe().split(" | ") if not axis.endswith(" none")]
    rank_zero_info(
        fill(" | ".join(axes), 80, initial_indent="objective  ", subsequent_indent=" " * 11)
    )
