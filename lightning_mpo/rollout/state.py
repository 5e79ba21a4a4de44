"""A rollout under way, and its form in a checkpoint: plain tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.checks import is_count
from lightning_mpo.scores import Denominators
from lightning_mpo.types import Experience, Rollout, take_rows

_BOOLEAN = ("valid", "outside", "hidden")


@dataclass(frozen=True)
class RolloutBuffer:
    """A rollout that updates are made of.

    Args:
        experience: all rows of this rank.
        plan: `plan[update][micro_batch]` holds row numbers.
        denominators: of each update, summed over ranks.
    """

    experience: Experience
    plan: list[list[Tensor]]
    denominators: list[Denominators]

    def micro_batch(self, update: int, micro: int) -> Experience:
        """Return the rows of a micro-batch."""
        rows = self.plan[update][micro].to(self.experience.rewards_B.device)
        return take_rows(self.experience, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        return {
            "experience": plain_state(self.experience),
            "plan": self.plan,
            "denominators": [
                (part.actions, part.tokens, part.credited) for part in self.denominators
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RolloutBuffer:
        """Restore a buffer from the entries of a checkpoint.

        Raises:
            TypeError: a field of rollout or experience is of another kind.
            ValueError: the plan does not hold each row of the experience.
        """
        # rollout and experience
        tensors = dict(state["experience"])
        check_state(Experience, tensors)
        check_state(Rollout, tensors["rollout"])
        rollout = Rollout(**tensors.pop("rollout"))
        experience = Experience(rollout=rollout, **tensors)
        # the plan must name every row
        plan = state["plan"]
        rows = torch.cat([rows for update in plan for rows in update])
        if sorted(set(rows.tolist())) != list(range(len(experience.rewards_B))):
            raise ValueError("`plan` of RolloutLoop does not name the rows of its experience")
        return cls(experience, plan, [Denominators(*parts) for parts in state["denominators"]])


def check_progress(state: Mapping[str, Any]) -> None:
    """Refuse the state of a `RolloutLoop` whose counter or gate is of another kind.

    Raises:
        TypeError: the counter is no count, or the gate neither true nor false.
        ValueError: rollouts were made and the state holds none.
    """
    if not is_count(state["counter"]) or not isinstance(state["gate_passed"], bool):
        raise TypeError("`counter` of RolloutLoop must be a count, and `gate_passed` true or false")
    if state["counter"] and "experience" not in state:
        raise ValueError(
            f"RolloutLoop has made {state['counter']} rollouts, and its state holds none"
        )


def plain_state(batch: Experience | Rollout) -> dict[str, Any]:
    """Return the fields that can be loaded as data: tensors and numbers, no texts."""
    state: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Rollout):
            state[item.name] = plain_state(value)
        elif isinstance(value, torch.Tensor):
            state[item.name] = value.cpu()
        elif isinstance(value, int):
            state[item.name] = value
    return state


def check_state(kind: type[Experience] | type[Rollout], state: Mapping[str, Any]) -> None:
    """Refuse fields of a kind that `plain_state` does not return.

    Args:
        kind: of the batch.
        state: its fields, without a rollout within.

    Raises:
        TypeError: names a field of another kind, or with another number of rows than the first.
    """
    rows: int | None = None
    for item in fields(kind):
        if item.name not in state or item.name == "rollout":
            continue
        # numbers
        value, suffix = state[item.name], item.name.rsplit("_", 1)[-1]
        if not isinstance(value, torch.Tensor):
            if "Tensor" in str(item.type) or not isinstance(value, int):
                raise TypeError(f"`{item.name}` of the rollout is a {type(value).__name__}")
            continue
        # tensors: dimensions, rows, masks
        if "Tensor" not in str(item.type) or value.ndim != len(suffix):
            raise TypeError(f"`{item.name}` of the rollout has {value.ndim} dimensions")
        rows = len(value) if rows is None else rows
        if len(value) != rows:
            raise TypeError(f"`{item.name}` of the rollout has {len(value)} rows, not {rows}")
        boolean = item.name.startswith(_BOOLEAN) or "_mask_" in item.name
        if boolean and value.dtype != torch.bool:
            raise TypeError(f"`{item.name}` of the rollout is of {value.dtype}, not torch.bool")
