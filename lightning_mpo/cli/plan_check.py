"""The process that `plan --check` measures, `python -m lightning_mpo.cli.plan_check -c CONFIG …`.

It prints the peaks as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys

from lightning_mpo.cli.plan_objects import build
from lightning_mpo.plan.check import measure

if __name__ == "__main__":
    # the standard output holds the JSON alone
    with contextlib.redirect_stdout(sys.stderr):
        peaks = measure(*build(sys.argv[1:]))
    print(json.dumps(peaks))
