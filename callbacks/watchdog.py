"""Warns of silent failures of training, each with the option that changes it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mpo.checks import at_least, positive
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.types import Finish


class Watchdog(RolloutCallback):
    """Warns of rollouts without a gradient and of ratios off 1 at first; stops at NaN.

    Each warning names a cause and an option, and is given once until its condition has gone away.

    Args:
        patience: rollouts in a row without any reward variance before the warning.
        ratio_tolerance: mean |log ratio| (nats) allowed in the first update of a rollout, where it
            should be 0.
    """

    def __init__(self, patience: int = 2, ratio_tolerance: float = 0.05) -> None:
        at_least("Watchdog", 1, patience=patience)
        positive("Watchdog", ratio_tolerance=ratio_tolerance)
        self.patience = patience
        self.ratio_tolerance = ratio_tolerance
        self._flat = 0
        self._raised: set[str] = set()

    def _tell(self, cause: str, holds: bool, sentence: str) -> None:
        if not holds:
            self._raised.discard(cause)
        elif cause not in self._raised:
            self._raised.add(cause)
            rank_zero_warn(sentence)

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        for cause, holds, sentence in self.diagnose(event, trainer):
            self._tell(cause, holds, sentence)

    def diagnose(self, event: RolloutEvent, trainer: L.Trainer) -> list[tuple[str, bool, str]]:
        """Return (name, whether it holds, message) for each problem that a rollout can show.

        A rollout without a gradient has only one cause here: the first that holds. Difficulty is
        the last one.
        """
        rollout, scores = event.experience.rollout, event.scores
        rows, longest = len(scores.rewards_B), rollout.response_mask_BT.shape[1]
        # causes that explain a rollout without a gradient
        unjudged = rows - int(scores.judged_B.sum())
        answered = bool(scores.answered_B.any())
        truncated = bool((rollout.finish_B == Finish.LENGTH).all())
        # rollouts in a row without a gradient
        self._flat = self._flat + 1 if _flat(event) else 0
        late = self._flat >= self.patience
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
            ("flat", late and not other_cause, self._why_flat(event)),
        ]

    def _why_flat(self, event: RolloutEvent) -> str:
        """Return why no completion is better than another of the same prompt."""
        scores, critic = event.scores, event.experience.values_BT is not None
        # words of the messages
        rewards_B, span = scores.rewards_B[scores.judged_B], f"of the last {self._flat} rollouts"
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
        # no reward differs
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

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization) or not batch.get("last_of_update"):
            return
        off = trainer.callback_metrics.get("ratio/abs_log")
        if off is not None and batch.get("first_update"):
            self._tell(
                "ratio",
                bool(off > self.ratio_tolerance),
                f"the first update of a rollout has ratios off 1 (mean |log ratio| {off:.3g} "
                "nats): the scoring pass differs from the training pass; set dropout to 0 "
                "(`policy.lora.dropout`) and one `trainer.precision`",
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.grad is not None and not torch.isfinite(weight.grad).all():
                raise UserError(
                    f"the gradient of `{name}` is not finite at update {trainer.global_step}; "
                    "nothing was changed: lower the learning rate, set "
                    "`trainer.gradient_clip_val`, or look at the rewards in `completions/`"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"flat": self._flat, "raised": sorted(self._raised)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._flat, self._raised = state_dict["flat"], set(state_dict["raised"])


def _flat(event: RolloutEvent) -> bool:
    """Return whether all advantages are alike. With a critic its errors make them differ."""
    if event.experience.values_BT is None:
        return not bool(event.experience.advantages_BT.any())
    rewards_B = event.scores.rewards_B[event.scores.valid_B]
    return bool((rewards_B == rewards_B[:1]).all())


def _differ(values_B: Tensor, group_B: Tensor) -> bool:
    """Whether two completions of one prompt have different values; nan does not count."""
    groups = (values_B[group_B == g] for g in group_B.unique())
    return any(len(values_G[~values_G.isnan()].unique()) > 1 for values_G in groups)
