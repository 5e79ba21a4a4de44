"""The verbs of `lightning-mpo`."""

from __future__ import annotations

TRAINER_VERBS = ("fit", "validate", "test", "predict")
"""Verbs that Lightning's trainer answers."""
VERBS = (
    *TRAINER_VERBS,
    *("evaluate", "compare", "shift", "export", "configs", "methods", "plan", "rewards-check"),
    *("annotate", "sift", "dissect"),
    "verify-resume",
)
