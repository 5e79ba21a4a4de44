"""Runs a script of this folder, which starts its other processes itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(name: str, folder: Path) -> None:
    """Run a script with a folder as its argument, one torch thread for each process.

    Args:
        name: file name of the script, in this folder.
        folder: where the script writes its results.
    """
    script = str(Path(__file__).parent / name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
