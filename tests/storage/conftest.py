"""Fixtures that several files of this folder use."""

from __future__ import annotations

import pytest

from tests.support.shards import write


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "deep" / "last.ckpt")
