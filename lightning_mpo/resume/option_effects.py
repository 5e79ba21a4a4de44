"""The effect of a changed option on a resume: refused, reported or none."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

Effect = Literal["refused", "reported", "compared elsewhere", "none"]
"""Effect of a difference.

"refused": the run does not start. "reported": the configuration wins, with a message.

"compared elsewhere": another check handles it. "none": no number changes."""

EFFECTS: dict[Effect, tuple[str, ...]] = {
    "compared elsewhere": (
        "model",  # `identity`
        "model.objective*",
        "model.policy",
        "model.policy.lora*",
        "model.policy.quantization*",
        "model.policy.mtp*",
        "model.policy.critic*",
        "model.policy.mask_token",
        "model.policy.shift",
        "model.policy.characters",
        "model.policy.vocabulary",
        "model.policy.hidden_size",
        "model.policy.layers",
        "model.policy.heads",
        "model.policy.max_length",
        "model.policy.intermediate_size",
        "rollout.prompts",
        "rollout.completions",
        "rollout.minibatches",
        "rollout.epochs",
        "trainer.accumulate_grad_batches",
        "trainer.devices",
        "trainer.num_nodes",
        "model.optimizer*",  # `configured`
        "model.scheduler*",
        "model.learning_rates*",
        "model.policy.source",  # by their content
        "model.policy.checkpoint",
        "model.policy.reference_checkpoint",
        "data.train",
        "data.validation",
        "data.path",
        "data.folder",
        "data.hub",
        "data.subset",
        "data.streaming",
        "data.max_rows",
        "data.id",
        "data.train_problems",
        "data.held_out_problems",
    ),
    "reported": (
        "seed_everything",
        "threads",
        "versions.*",
        "model.temperature",
        "model.pool.max_new_tokens",
        "model.seed",
        "model.score_tokens",
        "model.batches_per_epoch",
        "model.policy.*",
        "data.seed",
        "data.max_prompt_tokens",
        "data.validation*",
        "rollout.seed",
        "rollout.max_new_tokens",
        "rollout.sampler*",
        "rollout.validation_*",
        "rollout.parity_gate",
        "rollout.reward_*",
        "rollout.failed_reward",
        "trainer.precision",
        "trainer.gradient_clip*",
        "trainer.accelerator",
        "trainer.strategy*",
        "trainer.deterministic",
        "trainer.benchmark",
        "trainer.limit_train_batches",
        "trainer.limit_val_batches",
        "trainer.val_check_interval",
        "trainer.check_val_every_n_epoch",
        "trainer.detect_anomaly",
        "trainer.plugins*",
        "trainer.use_distributed_sampler",
        "trainer.sync_batchnorm",
        "trainer.overfit_batches",
        "trainer.fast_dev_run",
        "callbacks.EarlyStopping*",
        "callbacks.KLTracking*",
        "callbacks.ReferenceUpdate*",
        "callbacks.*WeightAveraging*",
    ),
    "refused": (
        "model.batch_size",
        "model.likelihood*",
        "model.pool.prompts",
        "model.pool.completions",
        "model.pool.passes",
        "model.solutions",
        "data",
        "data.*",
        "rollout.rewards*",
        "rollout.dynamic*",
        "rollout.mask_truncated",
        "rollout.replay*",
        "rollout.stop*",
    ),
    "none": (
        "ckpt_path",
        "config",
        "weights_only",
        "include*",
        "warmup",
        "optimizer*",
        "lr_scheduler*",
        "trainer.max_*",
        "trainer.min_*",
        "trainer.default_root_dir",
        "trainer.logger*",
        "trainer.log_every_n_steps",
        "trainer.enable_*",
        "trainer.num_sanity_val_steps",
        "trainer.limit_test_batches",
        "trainer.limit_predict_batches",
        "trainer.inference_mode",
        "trainer.profiler*",
        "trainer.barebones",
        "trainer.reload_dataloaders_every_n_epochs",
        "trainer.model_registry",
        "trainer.callbacks",
        "callbacks.*ProgressBar*",
        "callbacks.*Checkpoint*",
        "callbacks.ExactResume*",
        "callbacks.Export*",
        "callbacks.HeadDiagnostics*",
        "callbacks.Heartbeat*",
        "callbacks.KillAt*",
        "callbacks.CountEvents*",
        "callbacks.LearningRateMonitor*",
        "callbacks.MemoryAccounting*",
        "callbacks.ModelSummary*",
        "callbacks.Predictions*",
        "callbacks.Preemption*",
        "callbacks.PromptOrder*",
        "callbacks.Report*",
        "callbacks.SaveConfig*",
        "callbacks.Samples*",
        "callbacks.SupportOverlap*",
        "callbacks.Throughput*",
        "callbacks.Watchdog*",
    ),
}
"""Patterns for paths of options, without `init_args`; the first match counts.

An object's path holds its class name.
"""


def effect(path: str) -> Effect | None:
    """Return the effect of a difference at a path; None: no pattern matches (as "reported")."""
    return next(
        (name for name, rules in EFFECTS.items() for rule in rules if fnmatchcase(path, rule)), None
    )
