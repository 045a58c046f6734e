"""Pictures as sketches, but for those that fixtures of a module draw."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _sketched(sketched: None) -> None:
    pass
