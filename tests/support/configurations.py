"""A small configuration of a run, which tests of the command line write into a file."""

from __future__ import annotations

BASE = """
seed_everything: 0
model:
  class_path: PolicyOptimization
  init_args:
    policy:
      class_path: TinyPolicy
      init_args: {hidden_size: 32, layers: 1, heads: 2}
    objective:
      support: FullVocabulary
      actions: TokenActions
      advantage: GroupRelative
      surrogate: ClippedRatio
      selection: AllTokens
      reduction: TokenMean
data:
  class_path: Arithmetic
  init_args: {digits: 1, train_problems: 12, held_out_problems: 4}
rollout: {rewards: [ExactAnswer], prompts: 2, completions: 2, max_new_tokens: 6}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 1
  limit_val_batches: 0
  default_root_dir: run
  logger: {class_path: CSVLogger, init_args: {save_dir: ., name: run, version: ""}}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {dirpath: run/checkpoints, save_last: true}}
"""
