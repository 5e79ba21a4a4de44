"""Callbacks of the training loop, one concern a file. Import them as `lightning_mpo.callbacks`."""

if __name__ != "lightning_mpo.callbacks":  # a second import path would make a second set of classes
    raise ImportError("import `lightning_mpo.callbacks`, not `callbacks`")

from lightning_mpo.callbacks.export import Export
from lightning_mpo.callbacks.heads import HeadDiagnostics
from lightning_mpo.callbacks.heartbeat import Heartbeat
from lightning_mpo.callbacks.held_out import HeldOutAnswers
from lightning_mpo.callbacks.kill import KillAt
from lightning_mpo.callbacks.kl import KLTracking
from lightning_mpo.callbacks.memory import MemoryAccounting
from lightning_mpo.callbacks.predictions import Predictions
from lightning_mpo.callbacks.preemption import Preemption
from lightning_mpo.callbacks.progress import RolloutProgressBar
from lightning_mpo.callbacks.prompt_order import PromptOrder
from lightning_mpo.callbacks.reference import ReferenceUpdate
from lightning_mpo.callbacks.report import Report
from lightning_mpo.callbacks.resume import ExactResume
from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.callbacks.samples import Samples
from lightning_mpo.callbacks.support import SupportOverlap
from lightning_mpo.callbacks.throughput import Throughput
from lightning_mpo.callbacks.watchdog import Watchdog

__all__ = [
    "ExactResume",
    "Export",
    "HeadDiagnostics",
    "Heartbeat",
    "HeldOutAnswers",
    "KLTracking",
    "KillAt",
    "MemoryAccounting",
    "Predictions",
    "Preemption",
    "PromptOrder",
    "ReferenceUpdate",
    "Report",
    "RolloutLoop",
    "RolloutProgressBar",
    "Samples",
    "SupportOverlap",
    "Throughput",
    "Watchdog",
]
