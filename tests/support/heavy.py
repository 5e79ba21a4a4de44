"""Packages that take seconds to import, so commands that need no tensor leave them alone."""

from __future__ import annotations

HEAVY = ("torch", "lightning", "transformers", "peft", "datasets", "matplotlib")
