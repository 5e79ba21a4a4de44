"""The analyses in benchmarks/mpo, which are scripts beside each other and no package."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "mpo"
sys.path.insert(0, str(SCRIPTS))
import clip_fraction  # noqa: E402
import common  # noqa: E402
import freeze  # noqa: E402
import ratio_variance  # noqa: E402
import reliability  # noqa: E402
import signal_to_noise  # noqa: E402

sys.path.remove(str(SCRIPTS))

__all__ = ["clip_fraction", "common", "freeze", "ratio_variance", "reliability", "signal_to_noise"]
