"""The command line: one parser of configurations (`parser.py`), and a file for each verb.

`run(["fit", "-c", "quickstart"])` runs a command line from Python.
"""

from lightning_mpo.cli.main import run

__all__ = ["run"]
