"""Changes to a checkpoint before it is written: loop progress, and weights left out."""

from __future__ import annotations

from typing import Any

from lightning_mpo.policies.base import Policy


def mend_epoch_end(checkpoint: dict[str, Any]) -> None:
    """Rewrite a checkpoint of `on_train_epoch_end` as if saved with the last batch before.

    Without `max_epochs`, Lightning 2.6.6 resumes it with one batch more than the epoch has: an
    update on a single micro-batch, and a rollout that is thrown away. An epoch that `max_steps` cut
    short it counts twice. Checkpoints of `on_train_batch_end` it resumes rightly. The dict is
    changed in place, before Lightning reads it.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    batch, epoch = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if (
        not batch["current"]["completed"]
        or epoch["current"]["processed"] != epoch["current"]["started"]
    ):
        return  # saved within an epoch
    for counts in (epoch["total"], epoch["current"]):
        counts["processed"] -= 1
        counts["completed"] = min(counts["completed"], counts["processed"])
    if batch["is_last_batch"] and batch["current"]["completed"] == batch["current"]["processed"]:
        for counts in (batch["total"], batch["current"]):
            counts["completed"] -= 1
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the loop adds it again


def keep_trained(checkpoint: dict[str, Any], policy: Policy) -> None:
    """Keep trained weights in a checkpoint and drop those that are reloaded, in place.

    The module has a `policy`.
    """
    state = {key.removeprefix("policy."): value for key, value in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {
        f"policy.{key}": value for key, value in policy.trained_state(state).items()
    }
