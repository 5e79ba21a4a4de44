"""The verbs that train and evaluate: `fit`, `validate`, `test` and `predict -c`."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mpo.callbacks import ExactResume, Preemption
from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.parser import CLI, OPTIONS
from lightning_mpo.cli.stages import find_list


def main(arguments: Sequence[str]) -> int:
    """Run a verb of the trainer.

    Args:
        arguments: the verb and its options, such as `["fit", "-c", "quickstart"]`.

    Returns:
        The exit code: 0, or 2 after a mistake of the user.
    """
    options = {
        "args": list(arguments),
        "trainer_defaults": {"callbacks": [ExactResume(), Preemption()]},
    }

    def action() -> None:
        plan = find_list(arguments[1:]) if arguments[0] == "fit" else None
        if plan is None:
            CLI(**OPTIONS | options)
        else:
            from lightning_mpo.cli.stage_runs import run_list  # what other runs do not need

            run_list(plan)

    return guarded(action)
