"""Exports the policy when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.export import Origin, Sampling, check_form, check_target, export, part_of
from lightning_mpo.export.origin import read_summary, read_yaml
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run, prompts_of
from lightning_mpo.policies.loaded import LoadedPolicy


class Export(L.Callback):
    """Writes the policy as a Hugging Face folder at the end of `fit`, loads it again and compares.

    `lightning-mpo export` does the same to a checkpoint. Put it behind `Report`, whose evaluation
    the model card shows.

    Args:
        folder: what is written; None: `export` in the run folder.
        form: "adapter", "merged" or "full"; None: adapters with LoRA, else all weights.
        dtype: of merged weights.
        overwrite: replace what an earlier export wrote there, once the new one is whole and
            compared.
        prompts: held-out prompts on which policy and reloaded model are compared.
    """

    def __init__(
        self,
        folder: str | None = None,
        form: Literal["adapter", "merged", "full"] | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        overwrite: bool = False,
        prompts: int = 8,
    ) -> None:
        at_least("Export", 1, prompts=prompts)
        self.folder, self.form, self.dtype = folder, form, dtype
        self.overwrite, self.prompts = overwrite, prompts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not isinstance(pl_module, PolicyOptimization):
            return
        if not isinstance(pl_module.policy, LoadedPolicy):
            raise UserError(
                "`Export` needs a `CausalPolicy` or a `MaskedPolicy`, got "
                f"{type(pl_module.policy).__name__}: leave `Export` out of the callbacks"
            )
        if type(trainer.strategy).__name__ in ("ModelParallelStrategy", "FSDPStrategy"):
            raise UserError(
                "`Export` needs whole weights, and these are sharded: use `lightning-mpo export` "
                "afterwards"
            )
        check_form(pl_module.policy, self._form(pl_module.policy))
        if trainer.is_global_zero and not is_fast_dev_run(trainer):
            check_target(self._folder(trainer), self.overwrite, "set `Export.overwrite: true`")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (
            not isinstance(pl_module, PolicyOptimization)
            or is_fast_dev_run(trainer)
            or not trainer.is_global_zero
        ):
            return
        policy, data = pl_module.policy, prompts_of(trainer)
        assert isinstance(policy, LoadedPolicy)
        # export, load again and compare
        source = next(
            callback for callback in callbacks_of(trainer) if isinstance(callback, RolloutLoop)
        )
        run = Path(trainer.log_dir or trainer.default_root_dir)
        folder, rows = self._folder(trainer), list(data.validation_rows or data.splits.train)
        check, notes = export(
            policy,
            folder,
            self._form(policy),
            data.encode(rows[: self.prompts]),
            dtype=self.dtype,
            sampling=Sampling(
                pl_module.temperature,
                source.max_new_tokens,
                pl_module.objective.support,
                source.sampler,
                tuple(source.stop),
            ),
            origin=Origin(
                read_yaml(run / "config.yaml"),
                trainer.global_step,
                source.counter,
                read_summary(run),
            ),
            data=data,
        )
        # results
        for note in notes:
            rank_zero_warn(note)
        if check.problems:
            raise UserError(
                f"the export in {part_of(folder)} differs from the policy: {check.problems[0]}; "
                f"{folder} is unchanged"
            )
        rank_zero_info(f"exported   into {folder}; loaded again and compared: {check}")

    def _form(self, policy: LoadedPolicy) -> Literal["adapter", "merged", "full"]:
        return self.form or ("full" if policy.lora is None else "adapter")

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "export")
