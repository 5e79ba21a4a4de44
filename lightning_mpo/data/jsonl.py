"""The earlier name of `Table` for files."""

from __future__ import annotations

from lightning_mpo.data.table import Table


class JsonLines(Table):
    """A `Table`; its arguments are those of `Table`."""
