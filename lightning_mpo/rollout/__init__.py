"""From prompts to updates: sampling, checks, rewards, old log-probs, mini-batches."""

from lightning_mpo.rollout.dynamic import DynamicSampling
from lightning_mpo.rollout.joining import join_rollouts
from lightning_mpo.rollout.record import load_rollout, save_rollout

__all__ = ["DynamicSampling", "join_rollouts", "load_rollout", "save_rollout"]
