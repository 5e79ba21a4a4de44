"""Precisions of a trainer under which a policy cannot be trained by reinforcement."""

from __future__ import annotations

from lightning_mpo.errors import UserError


def check_precision(precision: str) -> None:
    """Refuse a precision that rounds updates away, or under which sampler and trainer differ.

    Args:
        precision: `trainer.precision`.

    Raises:
        UserError: names the precision and the alternative.
    """
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"`trainer.precision: {precision}` trains half-precision weights, in which updates at "
            "RL learning rates round away; use `bf16-mixed`, or `policy.dtype: bfloat16` with "
            "`policy.lora`"
        )
    if precision in ("64-true", "transformer-engine", "transformer-engine-float16"):
        raise UserError(
            f"`trainer.precision: {precision}` is not supported: sampler and trainer would "
            "compute differently; use `32-true` or `bf16-mixed`"
        )
    if precision == "16-mixed":
        raise UserError(
            "`trainer.precision: 16-mixed` scales losses and leaves out the updates whose "
            "gradients overflow; use `bf16-mixed`, or `32-true`"
        )
