"""What the LightningModules of all stages share."""

from __future__ import annotations

from typing import Any, NoReturn

import lightning as L

from lightning_mpo.errors import UserError


class Stage(L.LightningModule):
    """A stage of training: its policy is an argument, and a checkpoint holds the weights alone."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Lightning would load nothing, without a word, as weights are made in `configure_model`.

        Raises:
            UserError: always; it says what to write instead.
        """
        given = repr(str(checkpoint_path)) if checkpoint_path is not None else "…"
        raise UserError(
            f"`{cls.__name__}.load_from_checkpoint` cannot know the policy, as a checkpoint holds weights alone: build the "
            f"policy with `checkpoint={given}`, or give `ckpt_path={given}` to `Trainer.fit`, `validate` or `predict`"
        )
