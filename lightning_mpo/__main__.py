"""The command line: `lightning-mpo fit -c quickstart`."""

from __future__ import annotations

import sys

from lightning_mpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
