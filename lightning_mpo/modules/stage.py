"""The base class of all LightningModules here."""

from __future__ import annotations

from typing import Any, NoReturn

import lightning as L

from lightning_mpo.errors import UserError


class Stage(L.LightningModule):
    """A stage of training, whose policy is an argument.

    A checkpoint holds weights, not the options of the policy.
    """

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any = None, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Refuse: Lightning would silently load nothing, as `configure_model` makes the weights.

        Raises:
            UserError: always, with the two ways to load weights.
        """
        given = repr(str(checkpoint_path)) if checkpoint_path is not None else "…"
        raise UserError(
            f"`{cls.__name__}.load_from_checkpoint` cannot build the policy, as a checkpoint "
            f"holds weights only: build the policy with `checkpoint={given}`, or give "
            f"`ckpt_path={given}` to `Trainer.fit`, `validate` or `predict`"
        )
