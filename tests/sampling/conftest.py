"""Fixtures that several files of this folder use."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy()
